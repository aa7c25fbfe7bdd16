"""Frozen settings: what a run is, in one value that can be hashed, written and read back.

The defaults of every section are the paper's protocol as its official code runs it (``docs/protocol.md`` lists each
value with its source). A preset, the data set's recommendation for that preset, and the user's ``key=value`` are laid
over them, in this order. Unknown keys are errors.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from cfrbench.errors import ConfigError, suggest

Triple = tuple[int, int, int]
M = TypeVar("M", bound=BaseModel)


class Frozen(BaseModel):
    """Base of every configuration: immutable, unknown keys refused."""

    # Built at first use: help and listings need no validators.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class GridSection(Frozen):
    """How a stored volume becomes the working volume that networks see."""

    downsample: int = Field(1, ge=1, description="whole-number factor; scores are always on the original grid")
    standardise: bool = Field(True, description="z-score each volume over all voxels (ShumengLI/CFR loader)")


class TuningSection(Frozen):
    """Fine-tuning of the foundation model (ShumengLI/CFR code/train_finetuning.py)."""

    steps: int = Field(6000, ge=1)
    batch_size: int = Field(2, ge=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup_steps: int = Field(0, ge=0, description="SAMed uses 250; the official CFR script cannot use its option")
    poly_power: float = 0.9
    patch: Triple | None = Field(None, description="crop laid out on one canvas; None = the training patch")
    canvas: int = Field(1024, ge=16, description="side of the square canvas in pixels")
    overflow: Literal["refuse", "official"] = "refuse"
    canvases: int = Field(1, ge=1, description="canvases of each crop in a step, drawn where a strategy makes several")
    accumulate: int = Field(1, ge=1, description="batches whose mean gradient makes one update")
    loss_at: Literal["canvas", "logits"] = Field(
        "canvas", description="'logits': where the decoder gives them, labels thinned out to match (SAMed, MedSAM v1)"
    )
    dice_weight: float = Field(0.5, ge=0, le=1, description="of Dice; cross-entropy has the rest. SAMed: 0.8")
    dice_smooth: float = Field(1e-10, gt=0, description="SAMed: 1e-5")
    intensity: Literal["auto", "none", "bezier", "bezier-rescaled", "gamma"] = Field(
        "auto",
        description="auto = the model's own; 'bezier' clamps z-scored values to [0, 1] as the official code does",
    )
    intensity_rate: float = Field(0.5, ge=0, le=1)
    rotflip: bool | None = Field(None, description="quarter turn and flip of the crop; None = as in training")
    rotflip_canvas: bool = Field(True, description="quarter turn and flip of the finished canvas")
    rotation_degrees: float = Field(0.0, ge=0, le=180, description="largest in-plane rotation of a crop; official: 0")
    zoom: float = Field(1.0, ge=1, description="largest in-plane enlargement or reduction of a crop; official: 1")


class PseudoSection(Frozen):
    """Pseudo-labels of unlabelled volumes."""

    mode: Literal["volume", "online"] = "volume"
    stride_fraction: float = Field(0.5, gt=0, le=1, description="step between overlapping crops, in crops")


class TrainingSection(Frozen):
    """Re-training of the 3D segmenter (ShumengLI/CFR code/train_retraining.py)."""

    steps: int = Field(6000, ge=1)
    labelled_batch: int = Field(2, ge=1)
    unlabelled_batch: int = Field(2, ge=1)
    patch: Triple = (112, 112, 80)
    optimiser: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.01, gt=0)
    momentum: float = 0.9
    weight_decay: float = Field(1e-4, ge=0)
    lr_policy: Literal["step", "poly-a", "poly-b", "constant"] = "step"
    rotflip: bool = Field(True, description="quarter turn and flip in the first two axes (LA, BraTS; not CT)")
    guidance_weight: float = Field(1.0, ge=0)
    guidance_schedule: Literal["constant", "linear-decay"] = Field(
        "constant", description="'linear-decay' is the line 1 - t/N that the official file has switched off"
    )
    checkpoint_seconds: float = Field(20.0, gt=0, description="wall-clock time between checkpoints; not part of keys")


class InferenceSection(Frozen):
    """Sliding windows over whole volumes, in working-grid voxels."""

    stride_xy: int = Field(18, ge=1)
    stride_z: int = Field(4, ge=1)


class ScoringSection(Frozen):
    """What makes two numbers comparable."""

    unit: Literal["voxel", "mm"] = "voxel"
    empty: Literal["penalty", "paper", "nan"] = "penalty"
    postprocess: Literal["none", "largest-component"] = "none"
    backend: Literal["native", "medpy"] = "native"


class ComputeSection(Frozen):
    """Where and how numbers are computed; part of every key, because it changes them."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="auto, cpu, cuda, cuda:N or mps")
    threads: int = Field(2, ge=1)
    precision: Literal["auto", "fp32", "fp32-fast", "bf16", "fp16"] = Field(
        "fp32", description="'fp32-fast' keeps channels last; 'auto' is bf16 where this machine computes it natively"
    )


class Settings(Frozen):
    """All sections, and the options of plug-ins under ``kind.name``."""

    grid: GridSection = Field(default_factory=GridSection)
    tuning: TuningSection = Field(default_factory=TuningSection)
    pseudo: PseudoSection = Field(default_factory=PseudoSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    inference: InferenceSection = Field(default_factory=InferenceSection)
    scoring: ScoringSection = Field(default_factory=ScoringSection)
    compute: ComputeSection = Field(default_factory=ComputeSection)
    options: dict[str, dict[str, Any]] = {}


SECTIONS = tuple(name for name in Settings.model_fields if name != "options")
KIND_NAMES = ("concat", "model", "tune", "ssl", "net", "data", "executor")
PresetName = Literal["smoke", "quick", "paper"]

#: preset -> plug-in choices and dotted settings. A data set adds its own for each preset (`DataSource.protocol`).
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "model": "tiny",
        "net.vnet.width": 2,
        "net.vnet.depth": 2,
        "net.unet3d.width": 2,
        "net.unet3d.depth": 2,
        "tuning.steps": 4,
        "tuning.batch_size": 1,
        "tuning.canvas": 64,
        "training.steps": 4,
        "inference.stride_xy": 8,
        "inference.stride_z": 8,
        "compute.threads": 1,
    },
    "quick": {
        "model": "lite-medsam",
        "net.vnet.width": 8,
        "net.unet3d.width": 8,
        "grid.downsample": 2,
        "tuning.steps": 300,
        "tuning.batch_size": 1,
        "training.steps": 900,
        "compute.precision": "auto",
        "compute.threads": 1,  # many stages side by side beat many threads in one
    },
    "paper": {"model": "sam-vit-b", "pseudo.mode": "online"},
}

PRESET_WORDS = {
    "smoke": "two-block random SAM and a V-Net of 2 filters: checks that everything runs, numbers mean nothing",
    "quick": "LiteMedSAM (real weights, 256 input), V-Net of 8 filters at half resolution, scored on the original grid",
    "paper": "SAM ViT-B at 1024, V-Net of 16 filters, 6000 iterations: the official protocol, hours on a GPU",
}


class RunConfig(Frozen):
    """One request: everything `cfrbench run` takes. A run is this value; its hash names the run."""

    dataset: str = "phantom"
    data_root: Path | None = None
    ssl: tuple[str, ...] = ("mt",)
    labels: tuple[int | str, ...] = (1,)
    concat: str = "grid"
    tune: str = "lora"
    model: str | None = Field(None, description="None = the preset's")
    net: str | None = Field(None, description="None = the data set's")
    seeds: tuple[int, ...] = (0,)
    preset: PresetName = "quick"
    baseline: bool = True
    bounds: bool = Field(True, description="train the supervised lower and upper bounds too")
    folds: int = Field(0, ge=0, description="cross-validate in so many folds; 0 = the official split")
    fold_seed: int = Field(0, ge=0)
    label_seeds: tuple[int, ...] = Field((), description="draw the labelled cases with each seed; () = the first ones")
    set: dict[str, Any] = {}

    def settings(self, recommended: Mapping[str, Any]) -> Settings:
        """Defaults, then preset, then the data set's ``recommended`` values, then ``set``."""
        layers: dict[str, Any] = {}
        for layer in (PRESETS[self.preset], recommended, self.set):
            layers.update(layer)
        layers.pop("model", None)
        return override(Settings(), layers)

    @property
    def model_name(self) -> str:
        """The foundation model asked for, or the preset's."""
        return self.model or str(PRESETS[self.preset]["model"])


def override(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Return ``settings`` with dotted keys replaced (``training.steps``, ``net.vnet.width``, ``data.phantom.seed``)."""
    dump = settings.model_dump()
    for key, value in values.items():
        head, _, rest = key.partition(".")
        if head in SECTIONS and rest and rest in dump[head]:
            dump[head][rest] = value
        elif head in KIND_NAMES and "." in rest:
            name, _, field = rest.rpartition(".")
            dump["options"].setdefault(f"{head}.{name}", {})[field] = value
        else:
            raise ConfigError(f"Unknown setting '{key}'. {suggest(key, known_keys())} Plug-in options are written "
                              "KIND.NAME.OPTION, for example net.vnet.width.")  # fmt: skip
    return validate(Settings, dump, "the settings")


def known_keys() -> list[str]:
    """Every dotted key of the sections."""
    return [f"{s}.{f}" for s in SECTIONS for f in type(getattr(Settings(), s)).model_fields]


def validate(model: type[M], values: Mapping[str, Any], where: str) -> M:
    """Build ``model`` from ``values``; pydantic's complaints become one ConfigError that names each field."""
    try:
        return model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        raise ConfigError(f"Wrong values in {where}: {_complaints(model, error)}") from error


def _complaints(model: type[BaseModel], error: pydantic.ValidationError) -> str:
    parts = []
    for item in error.errors():
        key = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            parts.append(f"'{key}' is unknown. {suggest(key, model.model_fields)}")
        else:
            parts.append(f"'{key}' = {item['input']!r}: {item['msg'].lower()}.")
    return " ".join(parts)


def parse_value(text: str) -> Any:
    """Read one ``--set`` value as TOML does; anything that is not TOML is a string."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def read_toml(path: Path) -> RunConfig:
    """Read a RunConfig from TOML; raises ConfigError that names the file."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error}. Give a TOML file.") from error
    return validate(RunConfig, values, str(path))


def write_toml(config: RunConfig) -> str:
    """Render a RunConfig as TOML that `read_toml` reads back to an equal value."""
    import tomli_w

    return tomli_w.dumps({k: v for k, v in config.model_dump(mode="json").items() if v is not None})


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of key order; pydantic models and paths are allowed."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, floats as Python prints them."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{type(value).__name__} cannot be part of a key")
