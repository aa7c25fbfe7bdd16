"""SAM-like models from parts: encoder, prompt encoder, a head with one mask a class, and how weights get into them.

For model plug-ins. `segment_anything` is imported when the first part is built, because that takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrbench.blocked_attention import block_attention
from cfrbench.compute import without_autocast
from cfrbench.contracts import Promptable
from cfrbench.errors import ConfigError, WeightsError
from cfrbench.files import sha256_file
from cfrbench.volume import check_classes
from cfrbench.weights import read_checkpoint

__all__ = ["DecoderShape", "FrozenBatchNorm2d", "ViTShape", "freeze", "load_matching", "mask_head", "prompt_encoder",
           "read_checkpoint", "resize_positions", "sha256_file", "standardise_pixels", "vit_sam"]  # fmt: skip

T = TypeVar("T", bound=nn.Module)

#: parts of the decoder whose number depends on the classes; the official loader means to leave them random
CLASS_PARTS = ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of prompt encoder and mask decoder; the defaults are SAM's."""

    width: int = 256
    depth: int = 2
    heads: int = 8
    mlp_width: int = 2048
    iou_width: int = 256
    mask_channels: int = 16


@dataclass(frozen=True)
class ViTShape:
    """Sizes of SAM's image encoder; blocks not in ``global_blocks`` attend within windows."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int = 14
    patch: int = 16
    mlp_ratio: float = 4.0


VIT_B = ViTShape(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11))


def vit_sam(shape: ViTShape, input_size: int, num_classes: int, decoder: DecoderShape | None = None) -> Promptable:
    """A SAM for ``input_size`` pixels, freshly initialised from torch's global generator.

    ConfigError for a size that is not a multiple of the patch.
    """
    from segment_anything.modeling import ImageEncoderViT

    if input_size % shape.patch or input_size < 2 * shape.patch:
        near = max(2, round(input_size / shape.patch)) * shape.patch
        raise ConfigError(f"An image of {input_size} pixels cannot be cut into patches of {shape.patch}. Set "
                          f"input_size to a multiple of {shape.patch}, {near} for example.")  # fmt: skip
    decoder = decoder or DecoderShape()
    encoder = ImageEncoderViT(
        img_size=input_size,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=shape.mlp_ratio,
        out_chans=decoder.width,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=shape.window,
        global_attn_indexes=shape.global_blocks,
    )
    encoder.patch_embed.register_forward_hook(_channels_last)
    block_attention(encoder)
    prompts = prompt_encoder(input_size // shape.patch, input_size, decoder)
    return Promptable(encoder, prompts, mask_head(num_classes, decoder))


def _channels_last(patch_embed: nn.Module, images: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
    # The convolution leaves channels first in memory and every sum keeps that, so each norm would copy its input.
    return tokens.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# prompt encoder and head


def prompt_encoder(grid: int, input_size: int, shape: DecoderShape | None = None) -> nn.Module:
    """SAM's prompt encoder for embeddings of ``(grid, grid)`` and images of ``(input_size, input_size)``."""
    shape = shape or DecoderShape()
    prompts: nn.Module = _parts()[0](
        embed_dim=shape.width,
        image_embedding_size=(grid, grid),
        input_image_size=(input_size, input_size),
        mask_in_chans=shape.mask_channels,
    )
    return prompts


def mask_head(num_classes: int, shape: DecoderShape | None = None) -> nn.Module:
    """The decoder of SAMed and CFR: one mask for each of ``num_classes`` classes, background included.

    ``(masks (B, C, 4 g, 4 g), iou (B, C))`` from embeddings ``(B, width, g, g)``: always all masks, so the argument
    ``multimask_output`` has no effect (hitachinsk/SAMed ``segment_anything/modeling/mask_decoder.py``). DataError for
    more classes than a label can hold.
    """
    from segment_anything.modeling import TwoWayTransformer

    check_classes(num_classes)
    shape = shape or DecoderShape()
    transformer = TwoWayTransformer(
        depth=shape.depth, embedding_dim=shape.width, mlp_dim=shape.mlp_width, num_heads=shape.heads
    )
    head: nn.Module = _parts()[1](
        num_multimask_outputs=num_classes - 1,
        transformer=transformer,
        transformer_dim=shape.width,
        iou_head_hidden_dim=shape.iou_width,
    )
    return head


@cache
def _parts() -> tuple[type[Any], type[Any]]:
    """Our two subclasses, made once `segment_anything` has been imported."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder

    class Prompts(PromptEncoder):  # type: ignore[misc]
        """SAM's prompt encoder with positions in full precision."""

        def get_dense_pe(self) -> Tensor:
            # Under autocast the angles would be rounded to 8 bits before the sine is taken.
            with without_autocast(self.no_mask_embed.weight.device):
                positions: Tensor = super().get_dense_pe()
            return positions

    class Head(MaskDecoder):  # type: ignore[misc]
        """SAM's mask decoder that returns every mask it computes."""

        def forward(self, *, multimask_output: bool = True, **embeddings: Tensor) -> tuple[Tensor, Tensor]:
            return self.predict_masks(**embeddings)

        def predict_masks(
            self,
            image_embeddings: Tensor,
            image_pe: Tensor,
            sparse_prompt_embeddings: Tensor,
            dense_prompt_embeddings: Tensor,
        ) -> tuple[Tensor, Tensor]:
            prompts, images = len(sparse_prompt_embeddings), len(image_embeddings)
            # Unlike the base class: one prompt for each image goes with that image, not with every image.
            repeats = 1 if prompts == images else prompts
            source = image_embeddings.repeat_interleave(repeats, dim=0) + dense_prompt_embeddings
            own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(prompts, -1, -1)
            hidden, features = self.transformer(source, image_pe, torch.cat([own, sparse_prompt_embeddings], dim=1))
            features = self.output_upscaling(features.transpose(1, 2).reshape(source.shape))
            kernels = [mlp(hidden[:, 1 + index]) for index, mlp in enumerate(self.output_hypernetworks_mlps)]
            masks = torch.stack(kernels, dim=1) @ features.flatten(2)
            return masks.unflatten(2, features.shape[2:]), self.iou_prediction_head(hidden[:, 0])

    return Prompts, Head


# ---------------------------------------------------------------------------------------------------------------------
# weights


def load_matching(module: nn.Module, state: Mapping[str, Tensor], *, intended: bool = False) -> list[str]:
    """Copy every tensor of ``state`` whose name and shape match into ``module``; return the names left as they were.

    This is what SAMed and CFR effectively do: their strict load fails on the new class parts, but only after it has
    copied all that fits (hitachinsk/SAMed ``sam_lora_image_encoder.py``), so the hypernetworks of the first classes
    start pre-trained, and with three foreground classes the mask tokens too. ``intended`` leaves `CLASS_PARTS` as
    initialised, which the official comments announce. WeightsError if not even the image encoder fits.
    """
    own = module.state_dict()
    fits = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    if intended:
        fits = {name: value for name, value in fits.items() if not any(part in name for part in CLASS_PARTS)}
    left = [name for name in own if name not in fits]
    wrong = [name for name in left if not any(part in name for part in CLASS_PARTS)]
    if wrong:
        raise WeightsError(f"The checkpoint does not fit the model: {len(wrong)} of {len(own)} tensors are absent or "
                           f"of another shape, the first is {wrong[0]}. Give a checkpoint of this model.")  # fmt: skip
    module.load_state_dict(fits, strict=False)
    return left


def resize_positions(state: Mapping[str, Tensor], grid: int, global_attn_indexes: Iterable[int]) -> dict[str, Tensor]:
    """A copy of ``state`` whose position tables fit ``grid`` x ``grid`` tokens; other tensors are shared.

    The absolute table ``(1, h, w, width)`` is resized bilinearly, the relative tables ``(2 n - 1, head width)`` of
    global blocks linearly; window blocks keep theirs. The official code looks for the digits of ViT-B's global blocks
    in the name (hitachinsk/SAMed ``segment_anything/build_sam.py``), which hits window blocks of ViT-L and ViT-H.
    """
    resized = dict(state)
    absolute = "image_encoder.pos_embed"
    if absolute in state:
        channels_first = state[absolute].permute(0, 3, 1, 2)
        table = F.interpolate(channels_first, size=(grid, grid), mode="bilinear", align_corners=False)
        resized[absolute] = table.permute(0, 2, 3, 1).contiguous()
    for index in global_attn_indexes:
        for axis in "hw":
            name = f"image_encoder.blocks.{index}.attn.rel_pos_{axis}"
            if name in state:
                columns = state[name].T.unsqueeze(0)
                resized[name] = F.interpolate(columns, size=2 * grid - 1, mode="linear")[0].T.contiguous()
    return resized


# ---------------------------------------------------------------------------------------------------------------------
# pixels

#: of RGB images in 0..255 (facebookresearch/segment-anything ``segment_anything/build_sam.py``)
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def standardise_pixels(encoder: T) -> T:
    """Let an image encoder take images in [0, 1]: it scales them to 0..255 and standardises each channel as SAM does.

    Here and not in `FoundationModel.normalise`, because a crop has one channel and the statistics have three. They are
    not part of the state dict.
    """
    for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
        encoder.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
    encoder.register_forward_pre_hook(_standardised)
    return encoder


def _standardised(encoder: nn.Module, images: tuple[Tensor, ...]) -> Tensor:
    return (255.0 * images[0] - encoder.get_buffer("pixel_mean")) / encoder.get_buffer("pixel_std")


# ---------------------------------------------------------------------------------------------------------------------
# freezing


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode, whatever `train` its model is told."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stay as it is."""
        return super().train(False)


def freeze(module: nn.Module) -> None:
    """Stop gradients to all parameters and the drift of batch statistics, in place.

    A frozen encoder is put into training mode with the model around it at every step; its batch norms would then
    normalise by one canvas and forget what they were trained on.
    """
    module.requires_grad_(False)
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = FrozenBatchNorm2d
            part.eval()
