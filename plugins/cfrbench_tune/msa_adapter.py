"""Medical SAM Adapter: bottlenecks after the attention and beside the MLP of every block, in 2D and in 3D."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cfrbench.contracts import FineTuner, FoundationModel, Promptable, Published
from cfrbench.hookspecs import hookimpl
from cfrbench.lean import run_block
from cfrbench.promptable import freeze
from cfrbench.prompting import PromptedTuner, PromptOptions
from cfrbench.tuners import (
    CONSTANT,
    PATCH,
    TINY_VIT,
    VIT,
    Bottleneck,
    act_as,
    in_windows,
    plain_blocks,
    regrid,
    train_only,
    trainable,
)

#: weight of the adapter beside the MLP
SCALE = 0.5


class MsaAdapter(PromptedTuner):
    """Adapters and decoder train, the rest is frozen (KidsWithTokens/Medical-SAM-Adapter, from its description).

    Adapters start from torch's default initialisation, not from zero. Windows are cut before the first norm, so padding
    tokens become its bias. The original loads no relative position tables, because it names them otherwise than the
    checkpoints do: they stay zero (``rel_pos``). Its depth adapters exist in 2D too, trainable and unused.
    """

    name = "msa-adapter"
    encoders: ClassVar[tuple[str, ...]] = (VIT, TINY_VIT)
    place = "its adapters stand in the blocks"
    plain = True
    published: ClassVar[tuple[Published, ...]] = (
        Published("MSA 2D, as SAM", num_classes=4),
        Published("MSA 2D, no prompt, 1 class"),
    )

    #: the official step scheduler is built and never stepped, so the rate is constant
    original: ClassVar[Mapping[str, Any]] = CONSTANT | {"tuning.lr": 1e-4}

    class Config(PromptOptions):
        """The defaults are the official code's."""

        rel_pos: Literal["zero", "pretrained"] = Field(
            "zero", description="'zero': no relative positions, as official; 'pretrained': the checkpoint's tables"
        )
        image_size: int | None = Field(
            None, ge=32, multiple_of=16, description="side of the image, official 256 or 1024; None = the model's"
        )

    config: Config

    def refuses(self, model: FoundationModel) -> str | None:
        """A TinyViT has neither a table to resize nor, in our port, relative positions to leave out."""
        if model.encoder == TINY_VIT and self.config.image_size is not None:
            return f"image_size resizes the position table of a ViT; set model.{model.name}.input_size instead"
        return super().refuses(model)

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Put the adapters in; they and the decoder train."""
        freeze(model)
        encoder = model.image_encoder
        if hasattr(encoder, "pos_embed"):
            self._adapt_vit(model)
        else:
            adapt_tiny_vit(encoder)
        train_only(encoder, "Adapter")
        model.mask_decoder.requires_grad_(True)
        self.prompt(model)
        return trainable(model)

    def example(self, input_size: int) -> Tensor:
        """An image, or two slices."""
        image = super().example(self.config.image_size or input_size)
        return image if self.takes == "canvas" else image.expand(2, -1, -1, -1).unsqueeze(0)

    def _adapt_vit(self, model: Promptable) -> None:
        blocks = plain_blocks(model.image_encoder)
        for block in blocks:
            adapt_block(block, depth=self.takes == "slices")
            if self.config.rel_pos == "zero":
                for axis in "hw":
                    nn.init.zeros_(block.get_parameter(f"attn.rel_pos_{axis}"))
        act_as(model.image_encoder, MsaEncoder)
        if self.config.image_size is not None:
            regrid(model, self.config.image_size // PATCH, self.config.image_size)


class MsaAdapter3d(MsaAdapter):
    """The same with the depth branch: each token also attends to its column, the same place in the other slices.

    It takes the slices of a crop together. The original crops chunks of slices: ``tuning.patch`` sets their number.
    """

    name = "msa-adapter-3d"
    encoders = (VIT,)
    takes = "slices"
    published = (Published("MSA 3D, no prompt, 1 class"),)


# ---------------------------------------------------------------------------------------------------------------------
# ViT


class MsaEncoder(nn.Module):
    """SAM's image encoder for adapted blocks, on images of any size and stacks of slices."""

    patch_embed: Any
    pos_embed: nn.Parameter
    blocks: Any
    neck: Any

    def forward(self, images: Tensor) -> Tensor:
        """Embed ``(B, 3, S, S)``, or ``(B, D, 3, S, S)`` as ``B D`` images that know of their neighbours in depth."""
        depth = images.shape[1] if images.ndim == 5 else 1
        x = self.patch_embed(images.flatten(0, -4))
        x = x + resized_bicubic(self.pos_embed, x.shape[1])
        for block in self.blocks:
            x = run_block(self, block, x, depth)
        embedding: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return embedding


def resized_bicubic(table: Tensor, grid: int) -> Tensor:
    """A position table ``(1, h, w, width)`` for ``grid`` x ``grid`` tokens, made anew in every forward pass."""
    if table.shape[1:3] == (grid, grid):
        return table
    return F.interpolate(table.permute(0, 3, 1, 2), (grid, grid), mode="bicubic").permute(0, 2, 3, 1)


def adapt_block(block: nn.Module, depth: bool = False) -> MsaBlock:
    """Give one block of SAM its three adapters, in place."""
    width = block.get_parameter("norm1.weight").shape[0]
    block.add_module("MLP_Adapter", Bottleneck(width))
    block.add_module("Space_Adapter", Bottleneck(width, residual=True))
    block.add_module("Depth_Adapter", Bottleneck(width))
    adapted = act_as(block, MsaBlock)
    adapted.in_depth = depth
    return adapted


class MsaBlock(nn.Module):
    """``x + Space(attention(norm1 x))``, then ``x + mlp(n) + 0.5 Adapter(n)`` with n = norm2 x."""

    norm1: Any
    attn: Any
    norm2: Any
    mlp: Any
    window_size: int
    in_depth: bool
    MLP_Adapter: Any
    Space_Adapter: Any
    Depth_Adapter: Any

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        """Map tokens ``(B D, H, W, width)`` to the same shape."""
        attended = in_windows(x, self.window_size, lambda part: self.Space_Adapter(self.attn(self.norm1(part))))
        if self.in_depth:
            attended = attended + self._across(x, depth)
        x = x + attended
        normed = self.norm2(x)
        adapted: Tensor = x + self.mlp(normed) + SCALE * self.MLP_Adapter(normed)
        return adapted

    def _across(self, x: Tensor, depth: int) -> Tensor:
        """The same attention along the depth, each column of tokens laid out as a nearly square grid."""
        _, height, width, channels = x.shape
        columns = x.view(-1, depth, height * width, channels).transpose(1, 2)
        columns = columns.reshape(-1, *near_square(depth), channels)
        attended: Tensor = self.Depth_Adapter(self.attn(self.norm1(columns)))
        return attended.view(-1, height * width, depth, channels).transpose(1, 2).reshape(x.shape)


@cache
def near_square(count: int) -> tuple[int, int]:
    """The two factors of a number that are closest to each other."""
    small = next(factor for factor in range(math.isqrt(count), 0, -1) if count % factor == 0)
    return small, count // small


# ---------------------------------------------------------------------------------------------------------------------
# TinyViT: our own port, in none of the papers


def adapt_tiny_vit(encoder: nn.Module) -> None:
    """Put adapters after the attention and beside the MLP of every transformer block, in place.

    Beside the MLP, the adapter's hidden units stand next to the MLP's, since both go through a GELU.
    """
    for block in (part for part in encoder.modules() if hasattr(part, "attn") and hasattr(part, "local_conv")):
        attention, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
        projection, first, second = (
            attention.get_submodule("proj"),
            mlp.get_submodule("fc1"),
            mlp.get_submodule("fc2"),
        )
        width = projection.get_parameter("weight").shape[0]
        projection.add_module("Space_Adapter", Bottleneck(width, residual=True))
        adapter = Bottleneck(width)
        first.add_module("MLP_Adapter", adapter.D_fc1)
        second.add_module("MLP_Adapter", adapter.D_fc2)
        for part, kind in ((projection, AdaptedProjection), (first, WiderInput), (second, WiderOutput)):
            act_as(part, kind)


class AdaptedProjection(nn.Linear):
    """A linear layer and an adapter on its output."""

    Space_Adapter: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        adapted: Tensor = self.Space_Adapter(super().forward(x))
        return adapted


class WiderInput(nn.Linear):
    """The hidden units of an MLP, and behind them those of the adapter beside it."""

    MLP_Adapter: Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to ``(..., hidden + width / 4)``."""
        return torch.cat([super().forward(x), self.MLP_Adapter(x)], dim=-1)


class WiderOutput(nn.Linear):
    """The output of an MLP plus half that of the adapter beside it."""

    MLP_Adapter: Any

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(..., hidden + width / 4)`` to ``(..., width)``."""
        own, adapter = hidden.tensor_split([self.in_features], dim=-1)
        output: Tensor = super().forward(own) + SCALE * self.MLP_Adapter(adapter)
        return output


@hookimpl
def fine_tuners() -> list[type[FineTuner]]:
    """The 2D form and the one with the depth branch."""
    return [MsaAdapter, MsaAdapter3d]
