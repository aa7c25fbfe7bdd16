"""Training an encoder in less memory with the same numbers: blocks computed twice, frozen weights held at half size."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(encoder: nn.Module) -> None:
    """Let SAM's image encoder keep only the input of each block and compute the rest again in backward, in place.

    Blocks may be replaced afterwards, by a fine-tuner, say; dropout in them repeats its draws. An encoder that is given
    another forward goes on recomputing if that uses `run_block`.
    """
    encoder.recomputes = True  # type: ignore[assignment]
    encoder.__class__ = _recomputing_class()


def run_block(encoder: nn.Module, block: nn.Module, *inputs: Any) -> Any:
    """``block(*inputs)``, computed again in backward if that was asked of the encoder it stands in."""
    if getattr(encoder, "recomputes", False) and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


@cache
def _recomputing_class() -> type[nn.Module]:
    from segment_anything.modeling import ImageEncoderViT

    class RecomputingEncoder(ImageEncoderViT):  # type: ignore[misc]
        """`ImageEncoderViT` that stores one map ``(B, g, g, width)`` a block."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x)
            if self.pos_embed is not None:
                x = x + self.pos_embed
            for block in self.blocks:
                x = run_block(self, block, x)
            embedding: Tensor = self.neck(x.permute(0, 3, 1, 2))
            return embedding

    return RecomputingEncoder


def halve_frozen(encoder: nn.Module, dtype: torch.dtype, keep: Collection[str] = ()) -> list[str]:
    """Hold the weights of frozen linear layers in ``dtype``, in place; return the names of those layers.

    Under autocast to ``dtype`` the results are the same bit for bit, because autocast would round these weights in
    every forward pass; memory falls by half their size, and what it would spend on copies. Left alone: everything that
    trains, the layers named in ``keep`` (whose tensors are saved, say), and those a LoRA is to be merged into.
    """
    halved = []
    for name, layer in encoder.named_modules():
        parameters = list(layer.parameters(recurse=False))
        plain = type(layer) is nn.Linear and not name.endswith("base_layer") and name not in keep
        if plain and not any(parameter.requires_grad for parameter in parameters):
            layer.to(dtype)
            halved.append(name)
    return halved
