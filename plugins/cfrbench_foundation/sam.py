"""Segment Anything (facebookresearch/segment-anything) in its three sizes.

The digits in the names of the released files are the first of their MD5; what is checked is their SHA-256.
"""

from __future__ import annotations

from torch import Tensor

from cfrbench.contracts import FoundationModel
from cfrbench.hookspecs import hookimpl
from cfrbench.pretrained import PretrainedViT, Release
from cfrbench.promptable import VIT_B, ViTShape
from cfrbench.weights import RELEASED

ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything/"


class Sam(PretrainedViT):
    """A SAM of one size; the subclasses say which."""

    licence = "Apache-2.0"
    origin = "https://github.com/facebookresearch/segment-anything#model-checkpoints"

    def normalise(self, volumes: Tensor) -> Tensor:
        """Return z-scored crops as they are: CFR sets SAM's pixel mean to 0 and its deviation to 1."""
        return volumes


class SamViTB(Sam):
    """93,735,472 parameters at 1024 pixels; the model of the paper."""

    name = "sam-vit-b"
    title = "SAM ViT-B"
    kind = "SAM ViT-B"
    release = Release("sam_vit_b_01ec64.pth", ADDRESS + "sam_vit_b_01ec64.pth", RELEASED[kind], 375)
    shape = VIT_B


class SamViTL(Sam):
    """The middle size."""

    name = "sam-vit-l"
    title = "SAM ViT-L"
    kind = "SAM ViT-L"
    release = Release("sam_vit_l_0b3195.pth", ADDRESS + "sam_vit_l_0b3195.pth", RELEASED[kind], 1250)
    shape = ViTShape(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23))


class SamViTH(Sam):
    """The largest size."""

    name = "sam-vit-h"
    title = "SAM ViT-H"
    kind = "SAM ViT-H"
    release = Release("sam_vit_h_4b8939.pth", ADDRESS + "sam_vit_h_4b8939.pth", RELEASED[kind], 2565)
    shape = ViTShape(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31))


@hookimpl
def foundation_models() -> list[type[FoundationModel]]:
    """The three sizes."""
    return [SamViTB, SamViTL, SamViTH]
