"""Foundation models whose weights lie in a released file: where it is, how it is checked, what is loaded from it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor

from cfrbench.config import Frozen
from cfrbench.contracts import FoundationModel, Promptable
from cfrbench.errors import WeightsError
from cfrbench.lean import recompute_blocks
from cfrbench.promptable import ViTShape, load_matching, resize_positions, vit_sam
from cfrbench.weights import (
    RELEASED,
    copy_checkpoint,
    digest_of,
    download,
    fetch_command,
    read_checkpoint,
    weights_folder,
)


@dataclass(frozen=True)
class Release:
    """A published checkpoint file."""

    file: str  # the name under which it is looked for
    url: str = ""  # what serves the file itself; empty where only a page offers it (`FoundationModel.origin`)
    sha256: str | None = None  # None where none was published
    megabytes: int = 0


class PretrainedConfig(Frozen):
    """Options of every model with a checkpoint."""

    input_size: int = Field(1024, ge=32, multiple_of=16, description="side of the encoder's image in pixels")
    checkpoint: Path | None = Field(None, description="a file of this model's shape; None = the released one")
    head: Literal["official", "intended"] = Field(
        "official", description="'intended' leaves all class-dependent parts random, as the comments of SAMed say"
    )


class ViTConfig(PretrainedConfig):
    """Options of every model with a ViT encoder."""

    recompute: bool = Field(
        False, description="fine-tune in less memory: blocks are computed a second time in backward; the same numbers"
    )


class Pretrained(FoundationModel):
    """A model whose `build` is `architecture` with a checkpoint loaded into it."""

    release: ClassVar[Release]
    kind: ClassVar[str]  # as `cfrbench.weights.recognise` calls the checkpoint

    class Config(PretrainedConfig):
        """The defaults are CFR's."""

    config: PretrainedConfig

    @property
    def input_size(self) -> int:
        """The option of this name."""
        return self.config.input_size

    @property
    def path(self) -> Path:
        """The file the weights come from: the one given, or where the released one is looked for."""
        return self.weights or self.config.checkpoint or self.home()

    @abstractmethod
    def architecture(self, num_classes: int) -> Promptable:
        """Return the model with random weights, on torch's default device; needs no checkpoint."""

    def build(self, num_classes: int) -> Promptable:
        """Return the model with all weights that fit; WeightsError if the file is absent, damaged or another's."""
        path = self.present()
        # A file that somebody names may be another training of the same shape; one of the released name may not.
        state = self.read(path, whole=path.name == self.release.file)
        model = self.architecture(num_classes)
        load_matching(model, self.fitted(state), intended=self.config.head == "intended")
        return model

    def fitted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a checkpoint as they fit the input size."""
        return state

    def identity(self) -> str:
        """SHA-256 of the checkpoint."""
        return digest_of(self.present())

    def present(self) -> Path:
        """`path`; WeightsError with the ways to get the file if there is none."""
        if not self.path.is_file():
            raise WeightsError(f"The weights of {self.title} are missing: there is no file {self.path}. "
                               f"{self.how_to_get()}")  # fmt: skip
        return self.path

    @classmethod
    def home(cls, folder: Path | None = None) -> Path:
        """Where the released file is looked for, or would be in ``folder``."""
        return (folder or weights_folder()) / cls.release.file

    @classmethod
    def how_to_get(cls) -> str:
        """One or two sentences with commands."""
        named = f"name a copy with --set model.{cls.name}.checkpoint=PATH."
        if cls.release.url:
            return f"Fetch them with `{fetch_command(cls.release.url, cls.home())}`, or {named}"
        return (f"They are offered on {cls.origin}: download them in a browser and give "
                f"`cfrbench model get {cls.name} --from FILE`, or {named}")  # fmt: skip

    @classmethod
    def read(cls, path: Path, *, whole: bool) -> dict[str, Tensor]:
        """The tensors of this model's checkpoint, told by its shapes and, if ``whole``, by the published digest."""
        state = read_checkpoint(path, cls.release.sha256 if whole else None, cls.kind)
        owners = [title for title, sha256 in RELEASED.items() if sha256 == digest_of(path)]
        if owners and cls.title not in owners:
            raise WeightsError(f"{path} is the released checkpoint of {owners[0]}, which has the shapes of {cls.title} "
                               f"but not its training. {cls.how_to_get()}")  # fmt: skip
        return state

    @classmethod
    def fetch(cls, folder: Path | None = None, progress: Callable[[int, int], None] | None = None) -> Path:
        """Download the released checkpoint into ``folder`` (default: where `build` looks) and verify it."""
        target = cls.home(folder)
        if cls.release.url:
            download(cls.release.url, target, cls.release.sha256, progress)
        elif not target.is_file():
            raise WeightsError(f"{cls.title} has no address from which a program could fetch it. {cls.how_to_get()}")
        cls.read(target, whole=True)
        return target

    @classmethod
    def adopt(cls, source: Path, folder: Path | None = None) -> Path:
        """Verify a checkpoint that somebody has and copy it into ``folder`` (default: where `build` looks)."""
        cls.read(source, whole=True)
        return copy_checkpoint(source, cls.home(folder))


class PretrainedViT(Pretrained):
    """A SAM with a ViT encoder of one `shape`; position tables are resized to the input."""

    encoder = "vit"
    shape: ClassVar[ViTShape]

    class Config(ViTConfig):
        """The defaults are CFR's."""

    config: ViTConfig

    def architecture(self, num_classes: int) -> Promptable:
        """SAM for this input size."""
        model = vit_sam(self.shape, self.input_size, num_classes)
        if self.config.recompute:
            recompute_blocks(model.image_encoder)
        return model

    def narrowed(self) -> Self:
        """The same blocks with two heads of 8 channels, smaller windows and about an eighth of the input."""
        shape = replace(self.shape, width=16, heads=2, window=4)
        side = max(2, self.input_size // 256) * 32
        narrow = type(type(self).__name__, (type(self),), {"shape": shape})
        model: Self = narrow(self.config.model_copy(update={"input_size": side}))
        return model

    def fitted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The same tensors, tables resized."""
        grid = self.input_size // self.shape.patch
        if state["image_encoder.pos_embed"].shape[1] == grid:
            return state
        return resize_positions(state, grid, self.shape.global_blocks)
