"""Several decoders on the features of one encoder, which differ in how they step up (MC-Net and its descendants)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from cfrbench.backbone import Backbone, make_backbone

#: makes a layer ``(B, inputs, h, w, d) -> (B, outputs, 2h, 2w, 2d)``
StepUp = Callable[[int, int], nn.Module]
Mode = Literal["trilinear", "nearest"]


def raised(mode: Mode) -> nn.Module:
    """A layer that doubles every side; trilinear with corners aligned, as MC-Net and CauSSL have it."""
    return nn.Upsample(scale_factor=2, mode=mode, align_corners=True if mode == "trilinear" else None)


def mixed_then_raised(mode: Mode) -> StepUp:
    """A 1x1x1 convolution, then double sides (JuzhengMiao/CauSSL networks/vnet.py)."""
    return lambda inputs, outputs: nn.Sequential(nn.Conv3d(inputs, outputs, kernel_size=1), raised(mode))


def raised_then_convolved(mode: Mode) -> StepUp:
    """Double sides, then a 3x3x3 convolution (ycwu1997/MC-Net mcnet/networks/VNet.py)."""
    return lambda inputs, outputs: nn.Sequential(raised(mode), nn.Conv3d(inputs, outputs, kernel_size=3, padding=1))


class SharedEncoder(nn.Module):
    """One whole network ``net``, and further decoders that read its features, with weights of their own.

    Each further decoder is that of a network of the same kind in which a layer of ``steps_up`` stands where ``net``
    has a transposed convolution. In a network that has none (3D U-Net) the decoders differ in their weights alone.
    """

    def __init__(self, make_net: Callable[[], nn.Module], method: str, steps_up: Sequence[StepUp]) -> None:
        super().__init__()
        self.net = make_backbone(make_net, method)
        self.others = nn.ModuleList(_further_decoder(make_net, method, step_up) for step_up in steps_up)

    def forward(self, image: Tensor) -> list[Tensor]:
        """The logits of every decoder, the network's own first; dropout is drawn for each."""
        features = self.net.encode(image)
        return [decoder.segment(features) for decoder in self._all()]

    def filters(self) -> list[list[Tensor]]:
        """By decoder, the weights of the convolutions that all of them have; steps up are not among them."""
        decoders = [dict(decoder.named_modules()) for decoder in self._all()]
        shared = [name for name in decoders[-1] if all(isinstance(layers.get(name), nn.Conv3d) for layers in decoders)]
        return [[layers[name].weight for name in shared] for layers in decoders]

    def _all(self) -> list[Backbone]:
        return [self.net, *self.others]


def _further_decoder(make_net: Callable[[], nn.Module], method: str, step_up: StepUp) -> Backbone:
    decoder = make_backbone(make_net, method)
    decoder.remove_encoder()
    for parent in list(decoder.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.ConvTranspose3d):
                setattr(parent, name, step_up(layer.in_channels, layer.out_channels))
    return decoder
