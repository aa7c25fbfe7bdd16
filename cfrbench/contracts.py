"""The abstract class of each plug-in kind; `cfrbench.testing` checks their laws. Their values are in `cfrbench.values`.

Shapes: B batch, C classes (background first), ``(H, W, D)`` a crop or volume with slices last, S side of a canvas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cfrbench.config import Frozen, Triple, validate
from cfrbench.errors import CfrbenchError
from cfrbench.losses import class_map
from cfrbench.sam_like import Promptable as Promptable
from cfrbench.scan_steps import ScanSteps
from cfrbench.values import Batch as Batch
from cfrbench.values import Layout as Layout
from cfrbench.values import Phase as Phase
from cfrbench.values import Progress as Progress
from cfrbench.values import StageTask as StageTask
from cfrbench.values import StepOutput as StepOutput
from cfrbench.volume import Split, Volume

# ---------------------------------------------------------------------------------------------------------------------
# plug-in kinds


class _Configured(ABC):
    """A plug-in: a `name`, a frozen `Config`, and an instance made from it."""

    name: ClassVar[str]

    class Config(Frozen):
        """Options of the plug-in, set by ``--set KIND.NAME.OPTION=VALUE``."""

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else self.Config()


class ConcatStrategy(_Configured):
    """Lays volumes out as square images and takes them apart again.

    Laws: vectorised (no Python loop over slices or tiles); any leading axes; any dtype; on the device of its input.
    ``inverse(forward(v)) == v`` voxel for voxel if `exact`, else within `tolerance` of the value range. Integers are
    labels: they are moved or picked, never interpolated or averaged. A layout that cannot hold the volume refuses with
    what would fit; ``overflow="official"`` loses voxels as the original does.
    """

    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 0.0
    #: True where a voxel stands on several canvases (overlapping groups or patches, three planes): `inverse` takes the
    #: mean over them, and the labeller hands it class probabilities instead of logits
    averages: ClassVar[bool] = False

    @abstractmethod
    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> Layout:  # fmt: skip
        """Decide where every slice goes; ``draw`` seeds strategies that are random per sample."""

    def plan_training(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
                      draw: int = 0, done: float = 0.0) -> Layout:  # fmt: skip
        """The plan of one crop in fine-tuning, of which the share ``done`` in [0, 1) is over; `plan` by default.

        It may hold less than the whole volume. Of its N canvases, fine-tuning draws ``tuning.canvases``.
        """
        return self.plan(shape, canvas, overflow=overflow, draw=draw)

    def canvas_side(self, shape: Triple, canvas: int) -> int:
        """Side S of the canvases that `plan` makes: ``canvas`` (``tuning.canvas``), unless slices are not tiled."""
        return canvas

    def input_side(self, shape: Triple, input_size: int) -> int:
        """Side of the image the encoder takes: the model's ``input_size``; for another it is built anew."""
        return input_size

    @abstractmethod
    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """Lay ``(..., H, W, D)`` out as ``(..., N, S, S)``, N = ``layout.count``; ``fill`` goes where no slice is."""

    def forward_some(self, volumes: Tensor, layout: Layout, fill: float, chosen: Sequence[int]) -> Tensor:
        """The canvases ``chosen`` of `forward`, ``(..., len(chosen), S, S)``; override it if the others cost time."""
        return self.forward(volumes, layout, fill)[..., list(chosen), :, :]

    @abstractmethod
    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        """Take ``(..., N, S, S)`` apart into ``(..., H, W, D)``; extra axes before N (classes) are kept."""

    def identity(self) -> str:
        """A hash of the files that change what stands on a canvas, as part of keys; "" if it reads none."""
        return ""


class FoundationModel(_Configured):
    """A pre-trained promptable model: how to build it, what it wants to see, where its weights come from."""

    title: ClassVar[str]
    licence: ClassVar[str]
    origin: ClassVar[str]  # where a person gets the weights
    note: ClassVar[str] = ""  # printed under every table made with these weights
    intensity: ClassVar[str] = "bezier"  # the augmentation that fits what `normalise` returns (cfrbench.intensity)
    encoder: ClassVar[str] = ""  # the family of its image encoder, by which fine-tuners choose: "vit", "tiny-vit"

    def __init__(self, config: Any = None, weights: Path | None = None) -> None:
        super().__init__(config)
        self.weights = weights

    @property
    @abstractmethod
    def input_size(self) -> int:
        """Side of the square image the encoder takes; canvases are resized to it and logits back."""

    def resized(self, side: int) -> FoundationModel:
        """This model for images of ``(side, side)``, by its option ``input_size``; ConfigError if it takes no such."""
        return self._with(input_size=side)

    def recomputing(self) -> FoundationModel | None:
        """This model with its option ``recompute`` on: fine-tuned in less memory, bit for bit the same.

        None if it has no such option, or has it on already.
        """
        return self._with(recompute=True) if getattr(self.config, "recompute", None) is False else None

    def _with(self, **changed: Any) -> FoundationModel:
        options = self.config.model_dump() | changed
        return type(self)(validate(self.Config, options, f"the options of model.{self.name}"), self.weights)

    @abstractmethod
    def build(self, num_classes: int) -> Promptable:
        """Return the model with one mask per class, pre-trained weights loaded; WeightsError if they are missing.

        Everything that is random here must come from torch's global generator, which the caller has seeded.
        """

    def architecture(self, num_classes: int) -> Promptable:
        """Return the model of `build` with random weights, on torch's default device; needs no checkpoint if it can."""
        return self.build(num_classes)

    def narrowed(self) -> FoundationModel | None:
        """A model whose `architecture` has the same parameters by name and runs in no time, if there is one."""
        return None

    @abstractmethod
    def normalise(self, volumes: Tensor) -> Tensor:
        """Bring standardised crops ``(B, H, W, D)`` to the intensities the encoder was trained on."""

    @abstractmethod
    def identity(self) -> str:
        """A string that changes when the weights do (their SHA-256, or a seed); part of the key of fine-tuning."""


@dataclass(frozen=True)
class Published:
    """A published configuration of a fine-tuner on SAM ViT-B: one row of ``cfrbench model params``."""

    title: str
    options: Mapping[str, Any] = field(default_factory=dict)  # of the fine-tuner
    input_size: int = 1024  # side of the encoder's image
    num_classes: int = 2  # masks of the decoder, background included


class FineTuner(_Configured):
    """What is frozen, what is injected, what trains."""

    #: "slices" and "volume": all slices of a crop in order, not canvases; the concatenation strategy is not used
    takes: ClassVar[Literal["canvas", "slices", "volume"]] = "canvas"
    trains: ClassVar[bool] = True  # False: `adapt` returns nothing, the model is used as it is
    published: ClassVar[tuple[Published, ...]] = ()

    @abstractmethod
    def refuses(self, model: FoundationModel) -> str | None:
        """Why this fine-tuner does not fit that model, or None if it does."""

    def protocol(self) -> Mapping[str, Any]:
        """Settings (dotted keys) that belong to its options, laid between the data set's and the user's."""
        return {}

    def build(self, foundation: FoundationModel, num_classes: int) -> Promptable:
        """The model to adapt; by default with one mask for each class."""
        return foundation.build(num_classes)

    @abstractmethod
    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Freeze and inject in place; return the parameters to train."""

    def example(self, input_size: int) -> Tensor:
        """The smallest input of an adapted model, on torch's default device; its gradients are counted with it."""
        return torch.zeros(1, 3, input_size, input_size)

    @abstractmethod
    def export(self, model: Promptable) -> dict[str, Tensor]:
        """All tensors of an adapted model that differ from the pre-trained one; enough to `restore` it."""

    @abstractmethod
    def restore(self, model: Promptable, tensors: Mapping[str, Tensor]) -> None:
        """Load what `export` gave into a freshly adapted model; WeightsError if it does not fit."""

    @abstractmethod
    def merge(self, model: Promptable) -> None:
        """Fold what was injected into plain weights in place, for prediction without overhead."""


class SSLMethod(nn.Module, ABC):
    """Networks, losses and, if there is one, a teacher. It knows nothing of foundation models.

    Laws: every loss has a gradient in the network that is tested; teachers have none; same seed, same numbers. All
    state lives in parameters and buffers, so that ``state_dict`` resumes training bit for bit.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # as the tables of the field print it
    reference: ClassVar[str]  # paper, and repository path of the implementation that was compared
    uses_unlabelled: ClassVar[bool] = True
    relabels: ClassVar[bool] = False  # True if `labeller` may name a network; its strides then enter the key
    # What `cfrbench ssl show` prints beside the options; the symbols are those of docs/methods.md.
    formulas: ClassVar[Mapping[str, str]] = {}  # name of a loss -> its formula
    differences: ClassVar[tuple[str, ...]] = ()  # where paper, official code and this differ, a sentence each
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # named options: {"original": {"ramp_length": 200}}

    class Config(Frozen):
        """Options of the method, set by ``--set ssl.NAME.OPTION=VALUE``; ``config=original`` lays a named set below."""

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__()
        self.config = config if config is not None else self.Config()
        self.num_classes = num_classes

    @abstractmethod
    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """Compute the losses of one batch; called in train mode, before the update."""

    def fit_to(self, crop: Triple) -> None:
        """Called once, before training: build what depends on the crops' sides; ConfigError, with what fits."""

    def after_update(self, progress: Progress) -> None:
        """Called after the optimiser's update with the same progress as `step` (moving averages ...)."""

    def labeller(self, progress: Progress) -> nn.Module | None:
        """The frozen network whose labels of whole unlabelled volumes this phase learns (`Batch.own`), or None.

        Asked for at the first step of a phase, before `step`, and once more where a cut training goes on inside one:
        copy the network that is to label only if ``progress.phase_step`` is 0, and keep the copy among the submodules.
        """
        return None

    def own_labels(self, probabilities: Tensor) -> Tensor:
        """Labels ``(B, H, W, D)`` uint8 from the `labeller`'s ``(B, C, H, W, D)``; 255 for voxels to leave out."""
        return class_map(probabilities)

    @abstractmethod
    def predictor(self) -> nn.Module:
        """The network that is tested: ``(B, 1, H, W, D) -> (B, C, H, W, D)`` logits in eval mode."""

    def phases(self) -> tuple[Phase, ...]:
        """Parts of training, each with its own learning-rate schedule; one by default."""
        return (Phase("train"),)


class Segmenter(_Configured):
    """Builds a 3D network ``(B, channels, H, W, D) -> (B, C, H, W, D)`` logits."""

    @property
    @abstractmethod
    def divisor(self) -> int:
        """Every side of its input must be a multiple of this."""

    @abstractmethod
    def build(self, channels: int, num_classes: int) -> nn.Module:
        """A freshly initialised network; random numbers come from torch's global generator."""


class DataSource(_Configured):
    """A data set: its cases, its split, what it recommends."""

    title: ClassVar[str]
    modality: ClassVar[str]
    licence: ClassVar[str]
    origin: ClassVar[str]  # where a person gets it
    class_names: ClassVar[tuple[str, ...]]  # background first
    budgets: ClassVar[Mapping[str, int]] = {}  # "scarce", "moderate" -> labelled cases
    synthetic: ClassVar[bool] = False  # True: every table says "phantom"
    segmenter: ClassVar[str] = "vnet"  # what the paper trains on it; used where none is asked for
    axcodes: ClassVar[str] = "RAS"  # orientation of its arrays; scans to predict are turned to it and back
    scan_steps: ClassVar[ScanSteps] = ScanSteps()  # what its cases went through; scans to predict go through it too

    def __init__(self, config: Any = None, root: Path | None = None) -> None:
        super().__init__(config)
        self.root = root

    @property
    def num_classes(self) -> int:
        """Classes with background."""
        return len(self.class_names)

    @abstractmethod
    def split(self) -> Split:
        """Which case is used for what; DataError if the folder or its lists are wrong."""

    @abstractmethod
    def load(self, case: str) -> Volume:
        """Read one case through `checked_volume`; DataError that names the file."""

    @abstractmethod
    def fingerprint(self) -> Mapping[str, str]:
        """Case id -> SHA-256 of what `load` would read; part of every key, and how duplicates are found."""

    def patients(self) -> Mapping[str, str]:
        """Case id -> patient, where that is known: cross-validation keeps the cases of a patient in one fold."""
        return {}

    def without_label(self) -> frozenset[str]:
        """Training cases that have no label: they are never labelled ones, nor in a fold that is tested."""
        return frozenset()

    def signatures(self) -> Mapping[str, NDArray[Any]] | None:
        """Case id -> signature (`cfrbench.prepared.copies`), by which leaks are found; None: a run reads all images."""
        return None

    @abstractmethod
    def protocol(self, preset: str) -> Mapping[str, Any]:
        """Recommended settings (dotted keys) under a preset: patch, strides, augmentation, schedule."""


class Executor(_Configured):
    """Runs stages. It gets them in an order in which needs come first.

    The store is what all processes share: a stage is finished once its artifact is there, whoever computed it. An
    executor may keep files of its own in ``store/jobs/NAME``. One that lacks a package raises PluginError when made.
    """

    def __init__(self, config: Any = None, store: Path | None = None) -> None:
        super().__init__(config)
        self.store = store

    @abstractmethod
    def run(self, tasks: Sequence[StageTask], work: Callable[[StageTask], None]) -> dict[str, CfrbenchError]:
        """Run every task, skipping those whose needs failed; return failures by key. ``work`` can be pickled."""

    def cancel(self, keys: Collection[str]) -> str:
        """Withdraw stages that wait in a queue which outlives this process; what was done in words, "" if nothing."""
        return ""
