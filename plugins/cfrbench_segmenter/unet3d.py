"""3D U-Net as SSL4MIS trains it on BraTS: instance norm, max-pooling, trilinear steps up, skips that are concatenated.

Same layers and names as HiLab-git/SSL4MIS ``code/networks/unet_3D.py`` but for the classifier, which is ``out_conv``
here, ``final`` there, and ``dsv1`` in ``unet_3D_dv_semi.py`` (ShumengLI/CFR ``hierarchical_unet_3d.py`` is the same).
That network's three side heads are attached by the methods that need them (`cfrbench.backbone.Backbone`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench.backbone import Backbone, Conv3d
from cfrbench.config import Frozen
from cfrbench.contracts import Segmenter
from cfrbench.errors import UsageError
from cfrbench.hookspecs import hookimpl

DEEPEST = 4
Form = Literal["plain", "deep-supervision"]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions; the norm has neither parameters nor running statistics, though its switch says batch norm."""
    halves = [
        # In place is safe: the backward pass of the norm reads its input, not its output.
        nn.Sequential(Conv3d(n, outputs, kernel_size=3, padding=1), nn.InstanceNorm3d(outputs), nn.ReLU(True))
        for n in (inputs, outputs)
    ]
    return nn.Sequential(OrderedDict(conv1=halves[0], conv2=halves[1]))


class _UpBlock(nn.Module):
    """Double the sides of the level below, put the skip before it, convolve."""

    def __init__(self, skip: int, below: int) -> None:
        super().__init__()
        self.conv = _block(skip + below, skip)

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        raised = F.interpolate(below, scale_factor=2, mode="trilinear", align_corners=False)
        result: Tensor = self.conv(torch.cat([skip, raised], dim=1))
        return result


class UNet3D(Backbone):
    """``(B, channels, H, W, D) -> (B, num_classes, H, W, D)`` logits; each side a multiple of ``2 ** depth``."""

    title = "The 3D U-Net"
    name = "unet3d"

    def __init__(self, channels: int, num_classes: int, config: UNet3DSegmenter.Config) -> None:
        super().__init__()
        depth = config.depth
        self.config = config
        self.widths = widths = tuple(config.width << level for level in range(depth + 1))
        self._descent = [f"conv{number}" for number in range(1, depth + 1)]
        self._ascent = [f"up_concat{number}" for number in range(1, depth + 1)]
        inputs = [channels, *widths]
        for level, name in enumerate([*self._descent, "center"]):
            self.add_module(name, _block(inputs[level], widths[level]))
        for level in reversed(range(depth)):
            self.add_module(self._ascent[level], _UpBlock(widths[level], widths[level + 1]))
        self.out_conv = nn.Conv3d(config.width, num_classes, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):  # its bias keeps PyTorch's default
                nn.init.kaiming_normal_(module.weight)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Features of every level; UsageError if a side does not fit, or the norm would see a single voxel."""
        self.check_sides(image)
        if math.prod(image.shape[2:]) == 8 ** len(self._descent):
            raise UsageError(
                f"{self.title} reduces an input of {'x'.join(map(str, image.shape[2:]))} to one voxel, which its "
                "instance norm cannot standardise. Choose a larger patch (training.patch) or a smaller "
                "net.unet3d.depth."
            )
        features: list[Tensor] = []
        x = image
        for name in self._descent:
            features.append(self.get_submodule(name)(x))
            x = F.max_pool3d(features[-1], 2)
        bottleneck = self.get_submodule("center")(x)
        features.append(self.drop(bottleneck))
        return features

    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of every level but the bottleneck; with deep supervision each is dropped from on its way up."""
        maps: list[Tensor] = []
        x = features[-1]
        for level in reversed(range(len(self._ascent))):
            x = self.get_submodule(self._ascent[level])(features[level], x)
            if self.config.form == "deep-supervision":
                x = F.dropout3d(x, self.config.level_dropout[level], self.training)
            maps.append(x)
        return maps[::-1]

    def drop(self, x: Tensor) -> Tensor:
        """Drop single values in the plain form; the maps of the other form are dropped from already."""
        return F.dropout(x, self.config.dropout, self.training) if self.config.form == "plain" else x

    def remove_encoder(self) -> None:
        """Keep the blocks that lead upwards and the classifier."""
        for name in (*self._descent, "center"):
            delattr(self, name)


class UNet3DSegmenter(Segmenter):
    """3D U-Net of HiLab-git/SSL4MIS: 5,884,050 parameters at width 16 for two classes."""

    name = "unet3d"

    class Config(Frozen):
        """The defaults are SSL4MIS's."""

        width: int = Field(16, ge=1, description="channels at full resolution; they double with each halving")
        depth: int = Field(DEEPEST, ge=1, le=DEEPEST, description="number of halvings")
        # 'deep-supervision' is the network of URPC: it differs in where it drops, its side heads are the method's.
        form: Form = "plain"
        dropout: float = Field(
            0.3, ge=0, lt=1, description="plain form: element-wise, after the bottleneck and before the classifier"
        )
        level_dropout: tuple[float, float, float, float] = Field(
            (0.1, 0.2, 0.3, 0.5), description="deep supervision: of whole channels after each block up, level 0 first"
        )

    config: Config

    @property
    def divisor(self) -> int:
        """``2 ** depth``."""
        return 1 << self.config.depth

    def build(self, channels: int, num_classes: int) -> UNet3D:
        """A 3D U-Net with Kaiming-normal convolutions, as SSL4MIS initialises it."""
        return UNet3D(channels, num_classes, self.config)


@hookimpl
def segmenters() -> list[type[Segmenter]]:
    """The 3D U-Net."""
    return [UNet3DSegmenter]
