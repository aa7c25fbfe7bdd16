"""SAM-Med2D's adapter beside every MLP of SAM's image encoder, for the model that has it and the tuner that adds it.

Source: OpenGVLab/SAM-Med2D ``segment_anything/modeling/image_encoder.py``; names as in its checkpoints.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from cfrbench.errors import ConfigError


class Med2dAdapter(nn.Module):
    """Gates channels, mixes neighbours at half resolution, adds its input and normalises.

    ``(B, H, W, width)`` to the same shape; H and W even. 15,042,048 parameters at width 768. It is no identity at the
    start: Kaiming normal for every layer, as in the original.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)  # eps 1e-5, unlike the norms of SAM
        self.channel = nn.Sequential(
            nn.Linear(width, width // 4, bias=False), nn.ReLU(), nn.Linear(width // 4, width, bias=False), nn.Sigmoid()
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the adapted tokens."""
        gate = self.channel(tokens.mean(dim=(1, 2)))
        gated = (tokens * gate[:, None, None, :]).permute(0, 3, 1, 2)
        mixed: Tensor = self.norm(tokens + self.spatial(gated).permute(0, 2, 3, 1))
        return mixed


def add_adapters(encoder: nn.Module) -> None:
    """Put a `Med2dAdapter` beside the MLP of every block of SAM's image encoder, in place.

    Weights come from torch's global generator. ConfigError for an odd number of tokens a side.
    """
    blocks: Any = encoder.get_submodule("blocks")
    grid = encoder.get_parameter("pos_embed").shape[1]
    if grid % 2:
        raise ConfigError(f"The adapters of SAM-Med2D halve the grid of tokens, and {grid} x {grid} has no half. Set "
                          "input_size to a multiple of 32.")  # fmt: skip
    for block in blocks:
        block.add_module("Adapter", Med2dAdapter(block.norm2.normalized_shape[0]))
        block.__class__ = _adapted_class()


def drop_adapters(encoder: nn.Module) -> None:
    """Take out what `add_adapters` put in, in place: an official option for prediction."""
    from segment_anything.modeling.image_encoder import Block

    blocks: Any = encoder.get_submodule("blocks")
    for block in blocks:
        del block.Adapter
        block.__class__ = Block


@cache
def _adapted_class() -> type[nn.Module]:
    from segment_anything.modeling.image_encoder import Block, window_partition, window_unpartition

    class AdaptedBlock(Block):  # type: ignore[misc]
        """SAM's block with one term more: ``x + mlp(n) + Adapter(n)``, n the second norm of x."""

        def forward(self, x: Tensor) -> Tensor:
            attended = self.norm1(x)
            if self.window_size > 0:
                windows, padded = window_partition(attended, self.window_size)
                attended = window_unpartition(self.attn(windows), self.window_size, padded, x.shape[1:3])
            else:
                attended = self.attn(attended)
            x = x + attended
            normed = self.norm2(x)
            adapted: Tensor = x + self.mlp(normed) + self.Adapter(normed)
            return adapted

    return AdaptedBlock
