"""SAM's global attention a few rows of queries at a time: the same numbers, no table of all pairs of tokens.

At 1024 pixels that table holds 12 x 4096 x 4096 scores a block, made several times over and kept for backward. Here
each block of queries meets all keys, and backward computes its scores again.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: queries that meet all keys at once; images with fewer tokens take the ordinary path
QUERIES = 256


def block_attention(encoder: nn.Module) -> None:
    """Let the global attention of SAM's image encoder run in blocks, in place; weights and names stay."""
    for block in encoder.get_submodule("blocks").children():
        # a window is small enough as it is
        if getattr(block, "window_size", None) == 0:
            block.get_submodule("attn").__class__ = _blocked_class()


@cache
def _blocked_class() -> type[nn.Module]:
    from segment_anything.modeling.image_encoder import Attention, get_rel_pos

    class BlockedAttention(Attention):  # type: ignore[misc]
        """Attention on a map ``(B, H, W, width)`` with a bias for the distance in rows and one for that in columns."""

        def forward(self, x: Tensor) -> Tensor:
            batch, height, width, _ = x.shape
            if height * width <= QUERIES:
                return super().forward(x)  # type: ignore[no-any-return]
            parts = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            query, key, value = parts.reshape(3, batch * self.num_heads, height * width, -1).unbind(0)
            query = query.unflatten(1, (height, width))
            row_bias = torch.einsum("bhwc,hkc->bhwk", query, get_rel_pos(height, height, self.rel_pos_h))
            column_bias = torch.einsum("bhwc,wkc->bhwk", query, get_rel_pos(width, width, self.rel_pos_w))
            step = max(1, QUERIES // width)
            blocks = zip(*(torch.split(part, step, 1) for part in (query, row_bias, column_bias)), strict=True)
            mixed = torch.cat([_recomputed(*block, key, value, self.scale) for block in blocks], dim=1)
            mixed = mixed.view(batch, self.num_heads, height, width, -1).permute(0, 2, 3, 1, 4)
            projected: Tensor = self.proj(mixed.reshape(batch, height, width, -1))
            return projected

    return BlockedAttention


def _recomputed(*arguments: Any) -> Tensor:
    """`_attend`; what it needs for backward is computed again there."""
    if not torch.is_grad_enabled():
        return _attend(*arguments)
    mixed: Tensor = checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)
    return mixed


def _attend(query: Tensor, row_bias: Tensor, column_bias: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Queries ``(N, h, W, c)`` on keys and values ``(N, H W, c)``; biases ``(N, h, W, H)`` and ``(N, h, W, W)``."""
    scores = (query.flatten(1, 2) * scale) @ key.transpose(1, 2)
    scores = scores.view(*scores.shape[:2], row_bias.shape[-1], column_bias.shape[-1])
    scores = scores + row_bias.flatten(1, 2).unsqueeze(-1) + column_bias.flatten(1, 2).unsqueeze(-2)
    mixed: Tensor = scores.flatten(2).softmax(dim=-1) @ value
    return mixed
