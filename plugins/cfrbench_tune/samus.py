"""SAMUS: a convolutional branch beside SAM's image encoder, on small images with overlapping patches."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from cfrbench.contracts import FineTuner, Promptable, Published
from cfrbench.hookspecs import hookimpl
from cfrbench.lean import run_block
from cfrbench.promptable import freeze
from cfrbench.prompting import PromptedTuner
from cfrbench.tuners import (
    CONSTANT,
    PATCH,
    VIT,
    Bottleneck,
    act_as,
    channel_norm,
    in_windows,
    plain_blocks,
    regrid,
    resize_table,
    train_only,
    trainable,
)

#: what trains in the image encoder, by parts of names; the relative tables of global blocks are added one by one
TRAINED = ("Adapter", "cnn_embed", "post_pos_embed")


class Samus(PromptedTuner):
    """Image of a quarter of the model's side (256 for SAM), tokens half as many a side (32), a CNN that meets them.

    The encoder keeps all its weights; what is added to it trains (xianlin7/SAMUS
    ``models/segment_anything_samus/modeling/image_encoder.py``). The original freezes the decoder and is told by a
    click what to segment. Without prompts there are new mask tokens, which must train, so the decoder trains too; the
    CFR paper does not say what it did. ``prompt=click`` gives the original.
    """

    name = "samus"
    encoders = (VIT,)
    place = "its cross-attention stands in the global blocks"
    plain = True
    halves = True
    # A box counts as a click does, and SAM's code for clicks does not run on shapes alone.
    published = (Published("SAMUS, prompted", {"prompt": "box"}), Published("SAMUS, no prompt, 1 class"))
    original: ClassVar[Mapping[str, Any]] = CONSTANT | {
        "tuning.lr": 5e-4,
        "tuning.batch_size": 8,
        "tuning.loss_at": "logits",
        "tuning.dice_weight": 0.8,
    }

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Add the branch and the adapters, shrink tables and input."""
        freeze(model)
        encoder = model.image_encoder
        grid = encoder.get_parameter("pos_embed").shape[1] // 2
        build_branch(encoder, grid)
        train_only(encoder, *TRAINED)
        for block in encoder.get_submodule("blocks").children():
            if isinstance(block, GlobalBlock):
                block.get_parameter("attn.rel_pos_h").requires_grad_(True)
                block.get_parameter("attn.rel_pos_w").requires_grad_(True)
        model.mask_decoder.requires_grad_(self.config.prompt == "none")
        regrid(model, grid, grid * PATCH // 2)
        self.prompt(model)
        return trainable(model)

    def example(self, input_size: int) -> Tensor:
        """A quarter of the side."""
        return super().example(input_size // 4)


def build_branch(encoder: nn.Module, grid: int) -> None:
    """Put SAMUS into SAM's image encoder for ``grid`` x ``grid`` tokens, in place."""
    width = encoder.get_parameter("pos_embed").shape[-1]
    for block in plain_blocks(encoder):
        if block.window_size == 0:
            adapt_block(block, grid)
        else:
            act_as(block, WindowBlock)
    encoder.add_module("input_Adapter", Bottleneck(width, residual=True))
    encoder.add_module("cnn_embed", ConvolutionalEmbedding((64, 128, 256, width)))
    encoder.add_module("post_pos_embed", Halvings((width, width)))
    act_as(encoder, SamusEncoder)


# ---------------------------------------------------------------------------------------------------------------------
# encoder


class SamusEncoder(nn.Module):
    """SAM's image encoder with patches that overlap by half and a convolutional branch beside its blocks."""

    patch_embed: Any
    pos_embed: nn.Parameter
    blocks: Any
    neck: Any
    input_Adapter: Any
    cnn_embed: Any
    post_pos_embed: Any

    def forward(self, images: Tensor) -> Tensor:
        """Embed ``(B, 3, S, S)`` as ``(B, out, S / 8, S / 8)``, for patches of 16."""
        projection = self.patch_embed.proj
        stride = projection.stride[0] // 2
        cnn = self.cnn_embed(images).permute(0, 2, 3, 1)
        larger = F.interpolate(images, images.shape[-1] + stride, mode="bilinear", align_corners=False)
        tokens = F.conv2d(larger, projection.weight, projection.bias, stride).permute(0, 2, 3, 1)
        positions = self.post_pos_embed(self.pos_embed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.input_Adapter(tokens) + positions
        for block in self.blocks:
            x, cnn = run_block(self, block, x, cnn)
        embedding: Tensor = self.neck((x + 0.5 * cnn).permute(0, 3, 1, 2))
        return embedding


class WindowBlock(nn.Module):
    """SAM's own block; the branch passes by."""

    norm1: Any
    attn: Any
    norm2: Any
    mlp: Any
    window_size: int

    def forward(self, x: Tensor, cnn: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens ``(B, H, W, width)``; ``cnn`` of the same shape is returned as it is."""
        x = x + in_windows(self.norm1(x), self.window_size, self.attn)
        return x + self.mlp(self.norm2(x)), cnn


class GlobalBlock(nn.Module):
    """SAM's block, whose attention is preceded by one from the tokens to the branch."""

    norm1: Any
    attn: Any
    norm2: Any
    mlp: Any
    MLP_Adapter: Any
    Space_Adapter: Any
    refine_Adapter: Any

    def forward(self, x: Tensor, cnn: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens and branch, both ``(B, H, W, width)``; the cross-attention sees the branch before its update."""
        normed = self.norm1(x)
        x = x + self.attn(normed + self.Space_Adapter(normed, cnn))
        refined = self.refine_Adapter(cnn.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        normed = self.norm2(x)
        return x + self.mlp(normed) + 0.5 * self.MLP_Adapter(normed), refined


def adapt_block(block: nn.Module, grid: int) -> GlobalBlock:
    """Give one global block of SAM its adapters, and tables for ``grid`` tokens a side, in place."""
    attention: Any = block.get_submodule("attn")
    width = attention.proj.out_features
    block.add_module("MLP_Adapter", Bottleneck(width))
    block.add_module("Space_Adapter", CrossAttention(width, attention.num_heads))
    block.add_module("refine_Adapter", SingleConv(width, width))
    for axis in "hw":
        table = resize_table(attention.get_parameter(f"rel_pos_{axis}").detach(), 2 * grid - 1)
        attention.register_parameter(f"rel_pos_{axis}", nn.Parameter(table.contiguous()))
    return act_as(block, GlobalBlock)


class CrossAttention(nn.Module):
    """Attention of every token to every place of the branch, with biased projections and no relative positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Queries from ``x``, keys and values from ``other``, both ``(B, H, W, width)``."""
        parts = (self.q(x), self.k(other), self.v(other))
        query, key, value = (part.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return projected


# ---------------------------------------------------------------------------------------------------------------------
# convolutions


def convolution(channels: int, out: int) -> list[nn.Module]:
    """3 x 3 convolution without bias, layer norm over channels, GELU."""
    return [nn.Conv2d(channels, out, 3, padding=1, bias=False), channel_norm(out), nn.GELU()]


class SingleConv(nn.Module):
    """One `convolution`."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(*convolution(channels, out))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to ``(B, out, H, W)``."""
        mapped: Tensor = self.conv(x)
        return mapped


class Down(nn.Module):
    """Half the side by max pooling, then one `convolution`."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), *convolution(channels, out))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to ``(B, out, H / 2, W / 2)``."""
        mapped: Tensor = self.maxpool_conv(x)
        return mapped


class Halvings(nn.Module):
    """`Down` from one number of channels to the next."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.downs = nn.ModuleList([Down(*pair) for pair in pairwise(channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, channels[0], H, W)`` to ``(B, channels[-1], ...)``."""
        for down in self.downs:
            x = down(x)
        return x


class ConvolutionalEmbedding(Halvings):
    """A convolution of the image, then `Halvings`: at ``channels`` 64, 128, 256, width an eighth of its side."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__(channels)
        self.inc = SingleConv(3, channels[0])

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, 3, S, S)`` to ``(B, width, S / 8, S / 8)``."""
        return super().forward(self.inc(x))


@hookimpl
def fine_tuners() -> list[type[FineTuner]]:
    """SAMUS."""
    return [Samus]
