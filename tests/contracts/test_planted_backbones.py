"""Faults planted in networks that say they can be taken apart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor, nn

from cfrbench.contracts import Segmenter
from cfrbench.testing import check_segmenter
from cfrbench_segmenter.vnet import VNet


class Small(Segmenter):
    """A V-Net of two halvings; the faulty ones below differ in one thing."""

    name = "small"
    divisor = 4
    network: type[VNet] = VNet

    def build(self, channels: int, num_classes: int) -> nn.Module:
        return self.network(channels, num_classes, 2, 2, 0.5)


class Doubling(VNet):
    """Its forward does something that its parts do not."""

    def forward(self, image: Tensor) -> Tensor:
        return 2.0 * super().forward(image)


class Rewriting(VNet):
    """Saves memory where others still read."""

    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        features[0].data.zero_()
        return super().decode(features)


class Boasting(VNet):
    """Says it is wider than it is."""

    def __init__(self, channels: int, num_classes: int, width: int, depth: int, dropout: float) -> None:
        super().__init__(channels, num_classes, width, depth, dropout)
        self.widths = tuple(2 * width for width in self.widths)


class Complete(VNet):
    """Gives the bottleneck as a map of the decoder."""

    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [*super().decode(features), features[-1]]


class Keeping(VNet):
    """Keeps the encoder it is told to remove."""

    def remove_encoder(self) -> None:
        """Later."""


class Thorough(VNet):
    """Removes the classifier's weights too."""

    def remove_encoder(self) -> None:
        super().remove_encoder()
        nn.init.zeros_(self.out_conv.weight)


def segmenter_of(network: type[VNet]) -> type[Segmenter]:
    return type(network.__name__, (Small,), {"network": network})


def test_the_sound_network_passes() -> None:
    check_segmenter(Small)


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (Doubling, "do not give its output"),
        (Rewriting, "changes the features"),
        (Boasting, "by its `widths`"),
        (Complete, "The decoder of Complete gives levels"),
        (Keeping, "removes nothing"),
        (Thorough, "changes what its decoder gives"),
    ],
)
def test_a_faulty_network_is_found(network: type[VNet], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_segmenter(segmenter_of(network))
