"""The abstract class of each plug-in kind, and the values they exchange. `cfrbench.testing` checks their laws.

Shapes: B batch, C classes (background first), ``(H, W, D)`` a crop or volume with slices last, S side of a canvas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from cfrbench.config import Frozen, Triple
from cfrbench.errors import CfrbenchError
from cfrbench.volume import Split, Volume

# ---------------------------------------------------------------------------------------------------------------------
# values


@dataclass(frozen=True)
class Layout:
    """Where each voxel of a volume stands on the canvases; everything the inverse needs. Strategies extend it."""

    shape: Triple
    canvas: int
    count: int = 1  # canvases per volume


@dataclass(frozen=True)
class Batch:
    """One training batch: labelled crops first, then unlabelled ones.

    image ``(L + U, 1, H, W, D)`` float; label ``(L, H, W, D)`` uint8; pseudo ``(U, H, W, D)`` uint8 pseudo-labels that
    move with their images through every mix, or None in a baseline. There is no label of an unlabelled crop in here.
    """

    image: Tensor
    label: Tensor
    pseudo: Tensor | None = None

    @property
    def labelled(self) -> int:
        """L, the number of labelled crops."""
        return self.label.shape[0]


@dataclass(frozen=True)
class Progress:
    """Where training stands: 0-based ``step`` before its update, of ``total``; the same inside the current phase."""

    step: int
    total: int
    phase: int = 0
    phase_step: int = 0
    phase_total: int = 0


@dataclass(frozen=True)
class StepOutput:
    """What a step teaches: named, already weighted scalar losses whose sum is minimised.

    guided: the logits ``(U, C, H, W, D)`` on the unlabelled crops, one per network, to which guidance may be added.
    masks: by loss name, the voxels ``(N, 1 or C, H, W, D)`` of the last N crops that this loss counts, if not all.
    """

    losses: dict[str, Tensor]
    guided: tuple[Tensor, ...] = ()
    masks: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A part of training with its own learning-rate schedule; ``share`` is its weight among all phases."""

    name: str
    share: float = 1.0


@dataclass(frozen=True)
class StageTask:
    """One stage to run: ``key`` is the hash of ``recipe``; ``needs`` are the keys of the stages it reads."""

    stage: str
    key: str
    title: str
    needs: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)


class Promptable(nn.Module):
    """A SAM-like model run without prompts: image encoder, prompt encoder, mask decoder that returns all its masks."""

    def __init__(self, image_encoder: nn.Module, prompt_encoder: nn.Module, mask_decoder: nn.Module) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder: Any = prompt_encoder  # nn.Module's typing hides `get_dense_pe`
        self.mask_decoder = mask_decoder

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, 3, S, S)`` normalised images to low-resolution logits ``(B, C, s, s)``, one mask a class."""
        embedding = self.image_encoder(images)
        # No prompt: an empty sparse embedding and the learned "no mask" dense one, as ShumengLI/CFR does.
        sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
        logits, _ = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        result: Tensor = logits
        return result


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
    ``inverse(forward(v)) == v`` voxel for voxel if `exact`, else within `tolerance` of the value range. A layout that
    cannot hold the volume refuses with what would fit; ``overflow="official"`` loses voxels as the original does.
    """

    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 0.0

    @abstractmethod
    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> Layout:  # fmt: skip
        """Decide where every slice goes; ``draw`` seeds strategies that are random per sample."""

    @abstractmethod
    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """Lay ``(..., H, W, D)`` out as ``(..., N, S, S)``, N = ``layout.count``; ``fill`` goes where no slice is."""

    @abstractmethod
    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        """Take ``(..., N, S, S)`` apart into ``(..., H, W, D)``; extra axes before N (classes) are kept."""


class FoundationModel(_Configured):
    """A pre-trained promptable model: how to build it, what it wants to see, where its weights come from."""

    title: ClassVar[str]
    licence: ClassVar[str]
    origin: ClassVar[str]  # where a person gets the weights
    note: ClassVar[str] = ""  # printed under every table made with these weights
    intensity: ClassVar[str] = "bezier"  # the augmentation that fits what `normalise` returns (cfrbench.intensity)

    def __init__(self, config: Any = None, weights: Path | None = None) -> None:
        super().__init__(config)
        self.weights = weights

    @property
    @abstractmethod
    def input_size(self) -> int:
        """Side of the square image the encoder takes; canvases are resized to it and logits back."""

    @abstractmethod
    def build(self, num_classes: int) -> Promptable:
        """Return the model with one mask per class, pre-trained weights loaded; WeightsError if they are missing.

        Everything that is random here must come from torch's global generator, which the caller has seeded.
        """

    @abstractmethod
    def normalise(self, volumes: Tensor) -> Tensor:
        """Bring standardised crops ``(B, H, W, D)`` to the intensities the encoder was trained on."""

    @abstractmethod
    def identity(self) -> str:
        """A string that changes when the weights do (their SHA-256, or a seed); part of the key of fine-tuning."""


class FineTuner(_Configured):
    """What is frozen, what is injected, what trains."""

    takes: ClassVar[Literal["canvas", "slices", "volume"]] = "canvas"

    @abstractmethod
    def refuses(self, model: FoundationModel) -> str | None:
        """Why this fine-tuner does not fit that model, or None if it does."""

    @abstractmethod
    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Freeze and inject in place; return the parameters to train."""

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

    class Config(Frozen):
        """Options of the method, set by ``--set ssl.NAME.OPTION=VALUE``."""

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__()
        self.config = config if config is not None else self.Config()
        self.num_classes = num_classes

    @abstractmethod
    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """Compute the losses of one batch; called in train mode, before the update."""

    def after_update(self, progress: Progress) -> None:
        """Called after the optimiser's update with the same progress as `step` (moving averages ...)."""

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
    axcodes: ClassVar[str] = "RAS"  # orientation of its arrays; scans to predict are turned to it and back

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

    @abstractmethod
    def protocol(self, preset: str) -> Mapping[str, Any]:
        """Recommended settings (dotted keys) under a preset: patch, strides, augmentation, schedule."""


class Executor(_Configured):
    """Runs stages. It gets them in an order in which needs come first."""

    @abstractmethod
    def run(self, tasks: Sequence[StageTask], work: Callable[[StageTask], None]) -> dict[str, CfrbenchError]:
        """Run every task, skipping those whose needs failed; return failures by key. ``work`` can be pickled."""
