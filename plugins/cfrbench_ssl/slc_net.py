"""SLC-Net: a second network reads the first one's probabilities beside the image; both label crops for each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.adversarial import frozen_statistics
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.errors import ConfigError
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import block_dice_loss, class_map, cross_entropy, entropy_map, weighted_cross_entropy
from cfrbench.schedules import threshold_rampup
from cfrbench.teachers import ConsistencyOptions, noisy
from cfrbench.uncertainty import mean_probability


def widened(network: nn.Module, channels: int) -> nn.Module:
    """``network`` whose first convolution now reads ``channels`` channels, initialised anew as PyTorch does.

    The first is the one registered first; ConfigError if it is no `Conv3d` that reads one channel.
    """
    first = next((module for module in network.modules() if isinstance(module, nn.Conv3d)), None)
    if first is None or first.in_channels != 1:
        raise ConfigError(
            f"The method 'slc-net' widens the first 3D convolution of the segmenter, but that of "
            f"'{type(network).__name__}' does not read the image alone. Choose another segmenter, such as --net vnet."
        )
    first.in_channels = channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
    first.reset_parameters()
    return network


class Pair(nn.Module):
    """The shape-agnostic network and the shape-aware one, which reads ``1 + C`` channels: ``(B, 1, H, W, D)`` and p."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def aware(self, image: Tensor, logits: Tensor) -> Tensor:
        """Logits of the second network for an image and the logits of the first, through which gradients pass."""
        result: Tensor = self.second(torch.cat([image, logits.float().softmax(dim=1)], dim=1))
        return result

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the second network, as they are tested."""
        return self.aware(image, self.first(image))


class SLCNet(SSLMethod):
    """Two networks that label crops for each other; the second sees the first one's probabilities, so its shape too."""

    name = "slc-net"
    title = "SLC-Net"
    reference = (
        "Liu et al., Semi-supervised medical image segmentation using cross-model pseudo-supervision with shape "
        "awareness and local context constraints, MICCAI 2022; igip-liu/SLC-Net code/train_CLB.py (2D)"
    )
    formulas: ClassVar = {
        "supervised": "sum over k of 0.5 (CE(z_k,l, y) + the mean over 4 x 4 x 4 blocks of Dice(p_k,l, y)), z_2 of the "
        "noisy crop and p_1, through which network 1 learns too",
        "pseudo-supervision": "w(t) (CE(z_1,u, argmax z_2,u) + mean(exp(-U) CE(z_2,u, argmax z_1,u))), U the entropy "
        "in nats of the mean of 8 noisy passes of network 1; certainty=mask: [U < (0.75 + 0.25 R(t, N)) ln 2]",
    }
    differences = (
        "The official code is 2D (ACDC): a U-Net with instance norm and dropout on the bottleneck. Here both networks "
        "are the chosen segmenter, with its norm and dropout, and blocks are cut along all three axes.",
        "A segmenter reads one channel: the second network's first convolution is replaced by one of 1 + C channels, "
        "initialised as PyTorch does.",
        "The official norm has no running statistics; the 8 noisy passes leave those of network 1 as they are.",
        "If the number of blocks does not divide a side, blocks that lie wholly outside count 0, as officially.",
        "The journal extension masks instead of weighting (certainty=mask, an average over all voxels still, ln 2 for "
        "any C). Its order-reversing intensities and inverted maps are not offered.",
        "Network 1 is tested, as officially; tested=both is the official flag that tests network 2 behind it.",
        "Two officially equal optimisers are one here. The official rate jumps for one step at each multiple of 2500, "
        "which is left out; the ramp takes 200 epochs of 150 steps (N = 30000, poly-b), the best checkpoint is kept.",
    )
    configs: ClassVar = {"original": {"ramp_length": 200, "epoch_steps": 150}}

    class Config(ConsistencyOptions):
        """The values of the official ACDC command."""

        blocks: int = Field(4, ge=1, description="blocks along each axis whose Dice is averaged; 1 = the whole crop")
        passes: int = Field(8, ge=2, multiple_of=2, description="noisy passes of network 1 behind the uncertainty")
        noise_std: float = Field(0.1, ge=0, description="noise on crops, in standardised intensities")
        noise_clip: float = Field(0.05, ge=0, description="noise is clipped to this magnitude")
        certainty: Literal["weight", "mask"] = Field(
            "weight", description="what network 2 learns from: all voxels by exp(-U), or those below a threshold"
        )
        tested: Literal["first", "both"] = Field("first", description="network 1, or network 2 behind it")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        first = make_net()
        self.pair = Pair(first, widened(make_net(), 1 + num_classes))

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One pass through each network, and those behind the uncertainty."""
        known, options = batch.labelled, self.config
        first = self.pair.first(batch.image)
        second = self.pair.aware(noisy(batch.image, options.noise_std, options.noise_clip), first)
        one, two = first[known:], second[known:]
        crossed = cross_entropy(one, class_map(two.detach())) + weighted_cross_entropy(
            two, class_map(one.detach()), self._certainty(batch.image[known:], progress)
        )
        losses = {
            "supervised": self._supervised(first[:known], batch.label) + self._supervised(second[:known], batch.label),
            "pseudo-supervision": options.weight(progress) * crossed,
        }
        return StepOutput(losses, guided=(one, two))

    def _supervised(self, logits: Tensor, label: Tensor) -> Tensor:
        blocks = block_dice_loss(logits.float().softmax(dim=1), label, self.config.blocks)
        return 0.5 * (cross_entropy(logits, label) + blocks)

    @torch.no_grad()
    def _certainty(self, image: Tensor, progress: Progress) -> Tensor:
        """Weight ``(U, 1, H, W, D)`` of each voxel that network 1 labels for network 2."""
        options = self.config

        def disturbed(crops: Tensor) -> Tensor:
            logits: Tensor = self.pair.first(noisy(crops, options.noise_std, options.noise_clip))
            return logits

        with frozen_statistics(self.pair.first):
            uncertainty = entropy_map(mean_probability(disturbed, image, options.passes), normalised=False)
        if options.certainty == "weight":
            return (-uncertainty).exp()
        return (uncertainty < threshold_rampup(progress.step, progress.total, 0.75, 1.0) * math.log(2)).float()

    def predictor(self) -> nn.Module:
        """The first network, unless both are asked for."""
        return self.pair.first if self.config.tested == "first" else self.pair


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """SLC-Net."""
    return [SLCNet]
