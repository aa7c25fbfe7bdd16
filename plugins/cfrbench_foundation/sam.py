"""Segment Anything, ViT-B, ViT-L and ViT-H (facebookresearch/segment-anything), set up as SAMed and CFR do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from cfrbench.config import Frozen
from cfrbench.contracts import FoundationModel, Promptable
from cfrbench.errors import WeightsError
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import ViTShape, load_matching, resize_positions, vit_sam
from cfrbench.weights import digest_of, download, fetch_command, read_checkpoint, weights_folder

RELEASE = "https://dl.fbaipublicfiles.com/segment_anything/"


class Sam(FoundationModel):
    """A SAM of one size; the subclasses say which."""

    licence = "Apache-2.0"
    origin = "https://github.com/facebookresearch/segment-anything#model-checkpoints"
    encoder: ClassVar[str] = "vit"
    shape: ClassVar[ViTShape]
    size: ClassVar[str]  # as `cfrbench.weights.recognise` calls it
    file: ClassVar[str]  # its last six digits are the first of its SHA-256

    class Config(Frozen):
        """The defaults are CFR's."""

        input_size: int = Field(1024, ge=32, multiple_of=16, description="side of the encoder's image in pixels")
        checkpoint: Path | None = Field(None, description="a file of this SAM's shape; None = the released one")
        head: Literal["official", "intended"] = Field(
            "official", description="'intended' leaves all class-dependent parts random, as the comments of SAMed say"
        )

    config: Config

    @property
    def input_size(self) -> int:
        """1024 unless set otherwise; SAMed uses 512."""
        return self.config.input_size

    @property
    def path(self) -> Path:
        """The file the weights come from: the one given, or where the released one is looked for."""
        return self.weights or self.config.checkpoint or weights_folder() / self.file

    def build(self, num_classes: int) -> Promptable:
        """Return the model with position tables resized to the input and all weights that fit."""
        state = read_checkpoint(self._present(), self._released_digits, self.size)
        model = vit_sam(self.shape, self.input_size, num_classes)
        grid = self.input_size // self.shape.patch
        if state["image_encoder.pos_embed"].shape[1] != grid:
            state = resize_positions(state, grid, self.shape.global_blocks)
        load_matching(model, state, intended=self.config.head == "intended")
        return model

    def normalise(self, volumes: Tensor) -> Tensor:
        """Return z-scored crops as they are: CFR sets SAM's pixel mean to 0 and its deviation to 1."""
        return volumes

    def identity(self) -> str:
        """SHA-256 of the checkpoint."""
        return digest_of(self._present())

    def fetch(self, progress: Callable[[int, int], None] | None = None) -> Path:
        """Download the released checkpoint, verified, to where `build` looks for it."""
        return download(RELEASE + self.file, weights_folder() / self.file, _digits(self.file), progress)

    @property
    def _released_digits(self) -> str | None:
        # A file that somebody names may be another training of the same shape (MedSAM); the released one may not.
        return _digits(self.file) if self.path.name == self.file else None

    def _present(self) -> Path:
        if not self.path.is_file():
            target = weights_folder() / self.file
            raise WeightsError(f"The weights of {self.title} are missing: there is no file {self.path}. Fetch them "
                               f"with `{fetch_command(RELEASE + self.file, target)}`, or name a copy with "
                               f"--set model.{self.name}.checkpoint=PATH.")  # fmt: skip
        return self.path


def _digits(file: str) -> str:
    return Path(file).stem.rpartition("_")[2]


class SamViTB(Sam):
    """93,735,472 parameters at 1024 pixels; the model of the paper."""

    name = "sam-vit-b"
    title = "SAM ViT-B"
    size = "SAM ViT-B"
    file = "sam_vit_b_01ec64.pth"
    shape = ViTShape(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11))


class SamViTL(Sam):
    """The middle size."""

    name = "sam-vit-l"
    title = "SAM ViT-L"
    size = "SAM ViT-L"
    file = "sam_vit_l_0b3195.pth"
    shape = ViTShape(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23))


class SamViTH(Sam):
    """The largest size."""

    name = "sam-vit-h"
    title = "SAM ViT-H"
    size = "SAM ViT-H"
    file = "sam_vit_h_4b8939.pth"
    shape = ViTShape(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31))


@hookimpl
def foundation_models() -> list[type[FoundationModel]]:
    """The three sizes."""
    return [SamViTB, SamViTL, SamViTH]
