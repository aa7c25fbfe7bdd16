"""SAM's attention a few queries at a time: the same numbers, no table of all pairs of tokens.

At 1024 pixels that table holds 12 x 4096 x 4096 scores in each global block, and the package makes it several times
over and keeps it for backward. Here a block of queries meets all keys while its scores stay in the processor's cache,
and backward computes them again. On a CPU that is also twice as fast, in windows a quarter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cfrbench.compute import rounded_by_autocast, without_autocast

#: queries that meet all keys at once. 512 instead of 256 took 0.26 s instead of 0.30 for a global block of ViT-B (bf16,
#: two threads), with the same bits. Backward has fewer: what all queries add to keys is rounded once a block, so that
#: another number there would be another result, and it gained nothing (0.89 s).
QUERIES, QUERIES_BACK = 512, 256
#: scores held at once by each thread of a CPU, 2 MiB in bf16, so that they stay in its cache; at least one head's
SCORES = 1 << 20
#: the same elsewhere, where every block costs the start of kernels
SCORES_ELSEWHERE = 1 << 26
#: from so many keys in a row on a bias is added element by element; for fewer a product is several times faster
WIDE = 32


def block_attention(encoder: nn.Module) -> None:
    """Let the attention of SAM's image encoder run in blocks, in place; weights and names stay."""
    for block in encoder.get_submodule("blocks").children():
        block.get_submodule("attn").__class__ = _blocked_class()


@cache
def _blocked_class() -> type[nn.Module]:
    from segment_anything.modeling.image_encoder import Attention, get_rel_pos

    class BlockedAttention(Attention):  # type: ignore[misc]
        """Attention on a map ``(B, H, W, width)`` with a bias for the distance in rows and one for that in columns."""

        def forward(self, x: Tensor) -> Tensor:
            batch, height, width, _ = x.shape
            tokens = height * width
            # Rounded here once, or each projection and each LoRA beside one does it for itself, forth and back.
            x = rounded_by_autocast(x)
            parts = self.qkv.parts(x) if hasattr(self.qkv, "parts") else self.qkv(x).chunk(3, dim=-1)
            # In memory too: a single map can be viewed like this, and products would copy all its keys for every block.
            query, key, value = (
                part.view(batch, tokens, self.num_heads, -1).transpose(1, 2).contiguous().flatten(0, 1)
                for part in parts
            )
            if self.use_rel_pos:
                grid = query.unflatten(1, (height, width))
                rows = torch.einsum("nhwc,hkc->nhwk", grid, get_rel_pos(height, height, self.rel_pos_h))
                columns = torch.einsum("nhwc,wkc->nhwk", grid, get_rel_pos(width, width, self.rel_pos_w))
            else:
                rows, columns = (query.new_zeros(len(query), height, width, side) for side in (height, width))
            mixed = attend_with_bias(query, key, value, rows.flatten(1, 2), columns.flatten(1, 2), self.scale)
            mixed = mixed.view(batch, self.num_heads, height, width, -1).permute(0, 2, 3, 1, 4)
            projected: Tensor = self.proj(mixed.reshape(batch, height, width, -1))
            return projected

    return BlockedAttention


def attend_with_bias(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """``softmax(scale query key^T + bias) value``, shape ``(N, T, c)`` as all three.

    Key t stands in row ``t // W`` and column ``t % W``, T = H W; its bias for a query is the sum of that query's
    entries in ``rows (N, T, H)`` and ``columns (N, T, W)``. Differentiable in all five.
    """
    mixed: Tensor = _Attention.apply(query, key, value, rows.to(query.dtype), columns.to(query.dtype), scale)
    return mixed


class _Attention(torch.autograd.Function):
    """`attend_with_bias`; nothing is kept for backward but its inputs."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, rows, columns)
        ctx.scale = scale
        mixed = torch.empty_like(query)
        # Backward runs outside autocast; what it computes again has to be what was computed here.
        with without_autocast(query.device):
            for heads, here in _blocks(query, QUERIES):
                weights = _weights(query[here], key[heads], rows[here], columns[here], scale)
                mixed[here] = torch.bmm(weights, value[heads])
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, rows, columns = ctx.saved_tensors
        scale, gradient = ctx.scale, gradients[0].contiguous()
        by_query, by_rows, by_columns = (torch.empty_like(part) for part in (query, rows, columns))
        # Tokens innermost: the products that add to them are then up to a fifth faster, with the same bits.
        by_key, by_value = (part.new_zeros(part.transpose(1, 2).shape) for part in (key, value))
        for heads, here in _blocks(query, QUERIES_BACK):
            weights = _weights(query[here], key[heads], rows[here], columns[here], scale)
            by_value[heads].baddbmm_(gradient[here].transpose(1, 2), weights)
            by_weights = torch.bmm(gradient[here], value[heads].transpose(1, 2))
            by_scores = torch.ops.aten._softmax_backward_data(by_weights, weights, -1, weights.dtype)
            by_rows[here], by_columns[here] = _by_bias(by_scores, rows.shape[2], columns.shape[2])
            by_query[here] = torch.bmm(by_scores, key[heads]).mul_(scale)
            by_key[heads].baddbmm_(query[here].transpose(1, 2), by_scores, alpha=scale)
        return by_query, by_key.transpose(1, 2), by_value.transpose(1, 2), by_rows, by_columns, None


def _weights(query: Tensor, key: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Softmax weights ``(n, t, T)`` of a block of queries; the product is added to the bias where that stands."""
    return _bias(rows, columns).baddbmm_(query, key.transpose(1, 2), alpha=scale).softmax(dim=-1)


def _bias(rows: Tensor, columns: Tensor) -> Tensor:
    """The bias ``(n, t, T)`` of a block of queries."""
    height, width = rows.shape[2], columns.shape[2]
    if width >= WIDE:
        return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(2)
    return torch.cat([rows, columns], -1) @ _places(height, width, rows)


def _by_bias(by_scores: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The gradients of rows and columns."""
    if width >= WIDE:
        pairs = by_scores.reshape(*by_scores.shape[:2], height, width)
        return pairs.sum(-1), pairs.sum(-2)
    both = by_scores @ _places(height, width, by_scores).T
    return both[..., :height], both[..., height:]


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """One-hot ``(H + W, T)``: the row and the column in which each key stands."""
    row, column = (torch.eye(side, dtype=like.dtype, device=like.device) for side in (height, width))
    return torch.cat([row.repeat_interleave(width, 1), column.repeat(1, height)])


def _blocks(query: Tensor, queries: int) -> Iterator[tuple[slice, tuple[slice, slice]]]:
    """Slices of the first axis, and of the first two, that take ``query`` apart, ``queries`` at a time if need be."""
    count, tokens, _ = query.shape
    # Several heads where there are threads for them: each then multiplies whole matrices.
    budget = SCORES * torch.get_num_threads() if query.device.type == "cpu" else SCORES_ELSEWHERE
    step = tokens if tokens * tokens <= budget else queries
    heads = max(1, budget // (step * tokens))
    for first in range(0, count, heads):
        some = slice(first, first + heads)
        for start in range(0, tokens, step):
            yield some, (some, slice(start, start + step))
