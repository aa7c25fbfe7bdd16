"""The image encoder of 3DSAM-adapter: SAM's blocks on cubes of tokens, with windows in three dimensions.

Source: med-air/3DSAM-adapter, described in its paper; a part of the fine-tuner in ``sam3d_adapter.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrbench.lean import run_block
from cfrbench.tuners import PATCH, act_as, plain_blocks, resize_table

WINDOW = 8  # tokens a side
NECKS = 4
#: what of the encoder trains, by parts of names
TRAINED = ("norm1", "norm2", "adapter", "slice_embed", "depth_embed", "rel_pos_d", "necks")


@dataclass(frozen=True)
class Features:
    """What the encoder sees: ``levels`` of ``(B, width, g, g, g)``, the ``image (B, 1, 2g, 2g, 2g)``, and the depth."""

    levels: tuple[Tensor, ...]
    image: Tensor
    depth: int


def build_encoder(encoder: nn.Module, grid: int) -> None:
    """Turn SAM's image encoder into one for cubes of ``grid`` tokens a side, in place."""
    blocks = plain_blocks(encoder)
    width, out = encoder.get_parameter("pos_embed").shape[-1], encoder.get_parameter("neck.0.weight").shape[0]
    for index, block in enumerate(blocks):
        adapt_block(block, min(WINDOW, grid), shifted=index % 2 == 0 and grid > WINDOW)
    # the convolution takes 16 slices to one place in depth, each channel by itself
    encoder.add_module("slice_embed", nn.Conv3d(width, width, (1, 1, PATCH), (1, 1, PATCH), groups=width))
    encoder.register_parameter("depth_embed", nn.Parameter(torch.ones(1, grid, width)))
    encoder.add_module("necks", nn.ModuleList([neck(width, out) for _ in range(NECKS)]))
    del encoder.neck
    act_as(encoder, VolumeEncoder)


def neck(channels: int, out: int) -> nn.Sequential:
    """SAM's neck with one axis more."""
    return nn.Sequential(
        nn.Conv3d(channels, out, 1, bias=False),
        LayerNorm3d(out),
        nn.Conv3d(out, out, 3, padding=1, bias=False),
        LayerNorm3d(out),
    )


class LayerNorm3d(nn.LayerNorm):
    """Layer norm over the channels of ``(B, C, ...)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised map."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class VolumeEncoder(nn.Module):
    """SAM's image encoder on volumes; its patch projection and tables stay as they are."""

    patch_embed: Any
    pos_embed: nn.Parameter
    depth_embed: nn.Parameter
    slice_embed: Any
    blocks: Any
    necks: Any

    def forward(self, images: Tensor) -> Features:
        """Embed ``(B, D, 3, S, S)``, or ``(D, 3, S, S)`` as one volume."""
        volumes = images if images.ndim == 5 else images.unsqueeze(0)
        x = self._tokens(volumes)
        levels, count = [], len(self.blocks)
        for number, block in enumerate(self.blocks, start=1):
            x = run_block(self, block, x)
            # after every quarter of the blocks: 3, 6, 9 and 12 of 12
            ended = [i for i in range(NECKS) if max(1, count * (i + 1) // NECKS) == number]
            levels += [self.necks[i](x.movedim(-1, 1)) for i in ended]
        side = 2 * x.shape[1]
        grey = volumes[:, :, 0].movedim(1, -1).unsqueeze(1)
        image = F.interpolate(grey, (side, side, side), mode="trilinear", align_corners=False)
        return Features(tuple(levels), image, volumes.shape[1])

    def _tokens(self, volumes: Tensor) -> Tensor:
        """Tokens ``(B, g, g, g, width)`` with their positions.

        The depth is stretched after the projection instead of before: both are linear, and this is less to project.
        """
        batch, depth = volumes.shape[:2]
        patches = self.patch_embed(volumes.flatten(0, 1))  # (B D, g, g, width)
        grid = patches.shape[1]
        columns = (
            patches.view(batch, depth, *patches.shape[1:]).permute(0, 2, 3, 4, 1).flatten(0, 2)
        )  # (B g g, width, D)
        columns = F.interpolate(columns, grid * PATCH, mode="linear", align_corners=False)
        tokens = self.slice_embed(columns.view(batch, grid, grid, *columns.shape[1:]).permute(0, 3, 1, 2, 4))
        positions = F.avg_pool2d(self.pos_embed.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return tokens.movedim(1, -1) + positions.unsqueeze(3) + self.depth_embed[:, None, None]  # type: ignore[no-any-return]


def adapt_block(block: nn.Module, window: int, shifted: bool) -> VolumeBlock:
    """Turn one block of SAM into one for cubes of tokens, in place."""
    attention = block.get_submodule("attn")
    rows, columns = attention.get_parameter("rel_pos_h"), attention.get_parameter("rel_pos_w")
    attention.register_parameter("rel_pos_d", nn.Parameter((rows.detach() + columns.detach()) / 2))
    attention.register_parameter("lr", nn.Parameter(torch.ones(()), requires_grad=False))
    act_as(attention, VolumeAttention)
    width = attention.get_parameter("proj.weight").shape[0]
    block.add_module("adapter", VolumeAdapter(width, width // 2))
    adapted = act_as(block, VolumeBlock)
    adapted.window_size, adapted.shift = window, window // 2 if shifted else 0
    return adapted


class VolumeBlock(nn.Module):
    """Adapter, then SAM's block with windows in three dimensions, shifted by half a window in every other block."""

    norm1: Any
    attn: Any
    norm2: Any
    mlp: Any
    adapter: Any
    window_size: int
    shift: int

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, g, g, g, width)`` to the same shape."""
        x = self.adapter(x)
        normed, axes = self.norm1(x), (1, 2, 3)
        side, mask = self.window_size, None
        if self.shift:
            normed = normed.roll([-self.shift] * 3, axes)
            mask = border_mask(x.shape[1], side, self.shift, x.device)
        windows = to_windows(normed, side)
        joined = from_windows(self.attn(windows, mask), side, x.shape[1])
        x = x + (joined.roll([self.shift] * 3, axes) if self.shift else joined)
        mapped: Tensor = x + self.mlp(self.norm2(x))
        return mapped


class VolumeAdapter(nn.Module):
    """Half the width, a depthwise 3 x 3 x 3 convolution, and back; a ReLU after each, added to the input."""

    def __init__(self, width: int, middle: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, middle)
        self.conv = nn.Conv3d(middle, middle, 3, padding=1, groups=middle)
        self.linear2 = nn.Linear(middle, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, h, w, d, width)`` to the same shape."""
        middle = self.linear1(x).relu().movedim(-1, 1)
        return x + self.linear2(self.conv(middle).relu().movedim(1, -1)).relu()  # type: ignore[no-any-return]


class VolumeAttention(nn.Module):
    """SAM's attention in cubes ``(N, h, w, d, width)`` with a bias for the distance along each axis.

    ``lr`` scales the sum of the biases; it is 1 and frozen.
    """

    qkv: Any
    proj: Any
    num_heads: int
    scale: float
    rel_pos_h: nn.Parameter
    rel_pos_w: nn.Parameter
    rel_pos_d: nn.Parameter
    lr: nn.Parameter

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each cube; ``mask (W, T, T)`` is added to the scores of W successive cubes."""
        sides, tokens = x.shape[1:4], x.shape[1:4].numel()
        parts = self.qkv(x).view(len(x), tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)  # (N, heads, T, c)
        bias = self._bias(query.unflatten(2, sides), sides)
        scores = (query * self.scale) @ key.transpose(-2, -1) + self.lr * bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask.unsqueeze(1)).flatten(0, 1)
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(x.shape)
        projected: Tensor = self.proj(mixed)
        return projected

    def _bias(self, query: Tensor, sides: torch.Size) -> Tensor:
        """``(N, heads, T, T)`` from queries ``(N, heads, h, w, d, c)``."""
        tables = zip("xyz", (self.rel_pos_h, self.rel_pos_w, self.rel_pos_d), sides, strict=True)
        x, y, z = (
            torch.einsum(f"bnxyzc,{axis}kc->bnxyzk", query, relative(table, side)) for axis, table, side in tables
        )
        total = x[..., :, None, None] + y[..., None, :, None] + z[..., None, None, :]
        return total.flatten(5, 7).flatten(2, 4)


def relative(table: Tensor, side: int) -> Tensor:
    """A position table as ``(query, key, c)`` for ``side`` places, interpolated if it is for others."""
    places = torch.arange(side, device=table.device)
    return resize_table(table, 2 * side - 1)[places[:, None] - places[None, :] + side - 1]


def to_windows(x: Tensor, side: int) -> Tensor:
    """Cut ``(B, g, g, g, C)`` into cubes ``(B n^3, side, side, side, C)``."""
    batch, grid, channels = x.shape[0], x.shape[1], x.shape[4]
    cut = x.reshape(batch, *(3 * (grid // side, side)), channels)
    return cut.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, side, side, side, channels)


def from_windows(windows: Tensor, side: int, grid: int) -> Tensor:
    """Undo `to_windows`."""
    count, channels = grid // side, windows.shape[-1]
    cut = windows.view(-1, *(3 * (count,)), *(3 * (side,)), channels)
    return cut.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, grid, grid, grid, channels)


def border_mask(grid: int, side: int, shift: int, device: torch.device) -> Tensor:
    """``(n^3, T, T)``: -100 between tokens that the cyclic shift has brought together from opposite borders."""
    places = torch.arange(grid, device=device)
    part = (places >= grid - side).long() + (places >= grid - shift).long()
    parts = 9 * part[:, None, None] + 3 * part[None, :, None] + part[None, None, :]
    regions = to_windows(parts[None, ..., None], side).flatten(1)
    return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)
