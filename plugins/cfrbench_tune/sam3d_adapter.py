"""3DSAM-adapter: SAM's blocks on cubes of tokens, windows in three dimensions, a new decoder for volumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cfrbench.contracts import FineTuner, FoundationModel, Promptable, Published
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import freeze
from cfrbench.prompting import Prior, labels_of
from cfrbench.tuners import PATCH, VIT, NamedTuner, ScheduleOptions, regrid, train_only, trainable
from cfrbench_tune.volume_encoder import NECKS, TRAINED, WINDOW, Features, build_encoder

CLICKS_INSIDE, CLICKS_ANYWHERE = 10, 20


class Sam3dAdapter(NamedTuner):
    """A crop becomes as many tokens in depth as in height and width (med-air/3DSAM-adapter).

    Trained: norms, adapters, position in depth, necks, decoder; frozen: projections, attention, MLPs and SAM's tables.
    The image's side is half the model's (512 for SAM); a crop of any depth is stretched to it. Default is the automatic
    variant; ``clicks`` adds the prompt encoder, told by 10 places inside the target and 20 anywhere (not which is
    which, as in the original). In prediction the places are those of `cfrbench.prompting.Prior`.
    """

    name = "sam3d-adapter"
    encoders = (VIT,)
    place = "its cubes of tokens go through the blocks"
    plain = True
    halves = True
    takes = "volume"
    published = (
        Published("3DSAM-adapter, clicked, 1 class", {"clicks": True}),
        Published("3DSAM-adapter, automatic, 1 class"),
    )

    #: without its floor of 1 % of the rate and its clipping of gradients
    original: ClassVar[Mapping[str, Any]] = {
        "tuning.lr": 4e-4,
        "tuning.weight_decay": 0.0,
        "tuning.poly_power": 1.0,
        "tuning.batch_size": 1,
    }

    class Config(ScheduleOptions):
        """The defaults are the automatic variant."""

        clicks: bool = Field(False, description="the clicked variant, the one of the CFR paper's Table X by its size")

    config: Config

    def refuses(self, model: FoundationModel) -> str | None:
        """Windows of 8 tokens a side must fill the cube, or be all of it."""
        if reason := super().refuses(model):
            return reason
        grid = model.input_size // (2 * PATCH)
        if grid < 2 or (grid > WINDOW and grid % WINDOW):
            return (
                f"a cube of {grid} tokens a side is no multiple of its windows of {WINDOW}; set model.{model.name}"
                f".input_size to a multiple of {2 * PATCH * WINDOW}, or to {4 * PATCH} to {2 * PATCH * WINDOW}"
            )
        return None

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Rebuild the encoder for volumes; prompt encoder and decoder are replaced."""
        freeze(model)
        classes = int(model.mask_decoder.num_mask_tokens)  # type: ignore[arg-type]
        grid = model.image_encoder.get_parameter("pos_embed").shape[1] // 2
        build_encoder(model.image_encoder, grid)
        train_only(model.image_encoder, *TRAINED)
        regrid(model, grid, grid * PATCH)
        width = model.image_encoder.get_parameter("necks.0.0.weight").shape[0]
        transformer: Any = model.mask_decoder.get_submodule("transformer")
        if self.config.clicks:
            prompts = ClickEncoder(width, transformer.num_heads, transformer.mlp_dim)
            model.prompting, model.prompt_encoder = Clicking(classes), prompts
        else:
            model.prompt_encoder = NoPrompts()
        model.mask_decoder = VolumeDecoder(width, classes)
        return trainable(model)

    def example(self, input_size: int) -> Tensor:
        """Two slices of half the side."""
        return torch.zeros(1, 2, 3, input_size // 2, input_size // 2)


# ---------------------------------------------------------------------------------------------------------------------
# prompts


class NoPrompts(nn.Module):
    """The automatic variant: the deepest features go straight to the decoder."""

    def forward(self, points: None, boxes: None, masks: None) -> tuple[None, None]:
        """Nothing."""
        return None, None

    def get_dense_pe(self) -> None:
        """Nothing."""


class Clicking(Prior):
    """Draws clicks: from the labels in training, from the prior in prediction."""

    def forward(self, model: Promptable, images: Tensor, regions: Tensor | None) -> Tensor:
        """Logits ``(B D, C, s, s)`` of volumes ``(B, D, 3, S, S)`` whose voxels are numbered ``(B, D, R, R)``."""
        features = model.image_encoder(images)
        batch = len(features.image)
        if regions is None:
            clicks = self._middle(batch, features.image)
        else:
            label = labels_of(regions, self.classes).movedim(1, -1)
            clicks = torch.stack([self._clicks((each > 0) & (each < self.classes)) for each in label])
        deepest = model.prompt_encoder(features.levels[-1], clicks)
        features = Features((*features.levels[:-1], deepest), features.image, features.depth)
        logits: Tensor = model.mask_decoder(image_embeddings=features)[0]
        return logits

    def _clicks(self, target: Tensor) -> Tensor:
        """Places ``(30, 3)`` in [-1, 1] of a mask ``(H, W, D)``: random in training, evenly spread otherwise."""
        inside = target.nonzero()
        if len(inside) == 0:
            inside = torch.tensor([[side // 2 for side in target.shape]], device=target.device)
        scale = torch.tensor(target.shape, device=target.device)
        chosen = (2 * inside[self._spread(len(inside), CLICKS_INSIDE, target.device)] + 1) / scale - 1
        if self.training:
            anywhere = 2 * torch.rand(CLICKS_ANYWHERE, 3, device=target.device) - 1
        else:
            numbers = self._spread(target.numel(), CLICKS_ANYWHERE, target.device)
            anywhere = (2 * torch.stack(torch.unravel_index(numbers, target.shape), dim=1) + 1) / scale - 1
        return torch.cat([chosen, anywhere])

    def _spread(self, count: int, wanted: int, device: torch.device) -> Tensor:
        if self.training:
            return torch.randint(count, (wanted,), device=device)
        return (torch.arange(wanted, device=device) * 2 + 1) * count // (2 * wanted)

    def _middle(self, batch: int, like: Tensor) -> Tensor:
        return like.new_zeros(batch, CLICKS_INSIDE + CLICKS_ANYWHERE, 3)


class ClickEncoder(nn.Module):
    """Two rounds in which learned queries look at the clicked places, and the volume looks at the queries."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ClickLayer(width, heads, mlp_width) for _ in range(2)])

    def forward(self, deepest: Tensor, clicks: Tensor) -> Tensor:
        """Map features ``(B, width, h, w, d)`` and places ``(B, P, 3)`` in [-1, 1] to features."""
        # grid_sample counts the last axis first
        sampled = F.grid_sample(deepest, clicks.flip(-1)[:, :, None, None], align_corners=False)
        points, image = sampled.flatten(2).transpose(1, 2), deepest.flatten(2).transpose(1, 2)
        for layer in self.layers:
            points, image = layer(points, image)
        return image.transpose(1, 2).reshape(deepest.shape)


class ClickLayer(nn.Module):
    """A two-way block of SAM with ten queries of its own; its attention from tokens to image is never called."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        from segment_anything.modeling.transformer import TwoWayAttentionBlock

        self.block: Any = TwoWayAttentionBlock(width, heads, mlp_width)
        self.queries = nn.Parameter(0.1 * torch.randn(1, 10, width))

    def forward(self, points: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(B, P, width)`` and ``(B, T, width)`` to the same shapes."""
        block, count = self.block, self.queries.shape[1]
        tokens = torch.cat([self.queries.expand(len(points), -1, -1), points], dim=1)
        tokens = block.norm2(tokens + block.norm1(block.self_attn(tokens, tokens, tokens)))
        queries, points = tokens[:, :count], tokens[:, count:]
        queries = block.norm3(queries + block.mlp(queries))
        image = block.norm4(image + block.cross_attn_image_to_token(q=image, k=queries, v=queries))
        return points, image


# ---------------------------------------------------------------------------------------------------------------------
# decoder


class VolumeDecoder(nn.Module):
    """Four branches of two convolutions, doubled in size, joined with the image: logits of every voxel."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        middle = width // 2
        self.branches = nn.ModuleList(
            [nn.Sequential(*convolution(width, middle), *convolution(middle, middle)) for _ in range(NECKS)]
        )
        last = nn.Conv3d(middle, classes, 3, padding=1, bias=False)
        self.head = nn.Sequential(*convolution(NECKS * middle + 1, middle), last)

    def forward(self, image_embeddings: Features, **unused: Any) -> tuple[Tensor, None]:
        """Logits ``(B D, C, 2g, 2g)`` of the slices."""
        side = image_embeddings.image.shape[2:]
        pairs = zip(self.branches, image_embeddings.levels, strict=True)
        larger = [F.interpolate(branch(x), side, mode="trilinear", align_corners=True) for branch, x in pairs]
        logits = self.head(torch.cat([*larger, image_embeddings.image], dim=1))
        size = (*logits.shape[2:4], image_embeddings.depth)
        slices = F.interpolate(logits, size, mode="trilinear", align_corners=False)
        return slices.movedim(-1, 1).flatten(0, 1), None


def convolution(channels: int, out: int) -> list[nn.Module]:
    """3 x 3 x 3 convolution without bias, instance norm without weights, ReLU."""
    return [nn.Conv3d(channels, out, 3, padding=1, bias=False), nn.InstanceNorm3d(out), nn.ReLU()]


@hookimpl
def fine_tuners() -> list[type[FineTuner]]:
    """3DSAM-adapter."""
    return [Sam3dAdapter]
