"""Fine-tuning with prompts, as most of the originals do: a box or a click for each class in each slice.

The comparisons of the CFR paper use no prompts, because nobody gives any for unlabelled volumes; neither do our
defaults. With prompts, training draws them from the labels. Prediction has no labels to draw them from: they come from
a `Prior`, which says where the classes were in the labelled crops, and know nothing of the volume at hand.

A *region* is one class in one slice, wherever a concatenation strategy has put that slice. Regions are numbered in
volumes before these are laid out, so prompts are as good on canvases of many slices as on canvases of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cfrbench.config import Triple
from cfrbench.contracts import FoundationModel, Promptable
from cfrbench.tuners import NamedTuner, ScheduleOptions
from cfrbench.volume import IGNORE

#: the region of background in slice 0; smaller numbers, 255 among them, are no region
FIRST = IGNORE + 1
#: masks of the released decoder; a prompt is answered by the first
SAM_MASKS = 4
#: logit of a class that was not asked for; 0 is that of the background, so that one class alone is a sigmoid
ABSENT = -10.0
#: cells a side of a `Prior`
CELLS = 24
#: prompts decoded at once: each repeats the embedding of its image
PROMPTS_PER_PASS = 16

Kind = Literal["box", "click"]


class PromptOptions(ScheduleOptions):
    """Options of every fine-tuner whose original is prompted."""

    prompt: Literal["none", "box", "click"] = Field(
        "none", description="'none': one mask a class, as CFR; else SAM's own masks, one prompt a class and slice"
    )


class PromptedTuner(NamedTuner):
    """A fine-tuner with a prompted form."""

    #: largest outward move of each edge of a box in training, as a share of the image
    jitter: ClassVar[float] = 20 / 1024
    #: answer with the mask of the highest predicted IoU among the last three, not with the first
    best_mask: ClassVar[bool] = False

    class Config(PromptOptions):
        """Nothing but how it is asked and trained."""

    config: Any

    def build(self, foundation: FoundationModel, num_classes: int) -> Promptable:
        """With prompts, the decoder keeps SAM's own masks and all of its weights."""
        if self.config.prompt == "none":
            return foundation.build(num_classes)
        model = foundation.build(SAM_MASKS)
        model.classes = num_classes
        return model

    def prompt(self, model: Promptable) -> None:
        """Let an adapted model work with prompts, if the options say so."""
        if self.config.prompt != "none":
            classes = model.classes or int(model.mask_decoder.num_mask_tokens)  # type: ignore[arg-type]
            model.prompting = Prompting(self.config.prompt, classes, self.jitter, self.best_mask)


# ---------------------------------------------------------------------------------------------------------------------
# regions


def regions_of(label: Tensor, classes: int) -> Tensor:
    """Number the voxels of a label volume ``(..., D)`` by slice and class, int32; 255 stays 255."""
    slices = classes * torch.arange(label.shape[-1], dtype=torch.int32, device=label.device)
    return torch.where(label == IGNORE, IGNORE, FIRST + slices + label.int())


def labels_of(regions: Tensor, classes: int) -> Tensor:
    """The uint8 labels that `regions_of` was given; 255 where there is no region."""
    return torch.where(regions < FIRST, IGNORE, (regions - FIRST) % classes).to(torch.uint8)


class Prior(nn.Module):
    """How often each class was where in the labelled crops; part of what a fine-tuned model exports."""

    occupancy: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.register_buffer("occupancy", torch.zeros(classes, CELLS, CELLS, CELLS))

    @torch.no_grad()
    def observe(self, label: Tensor) -> None:
        """Add one label crop ``(H, W, D)``, stretched to a cube."""
        masks = torch.stack([label == c for c in range(self.classes)]).float()
        self.occupancy += F.adaptive_avg_pool3d(masks, CELLS).to(self.occupancy.device)

    def label(self, shape: Triple) -> Tensor:
        """The label volume that stands in for the unknown one: each class where it was at least half its highest."""
        foreground = self.occupancy[1:]
        peaks = foreground.amax(dim=(1, 2, 3), keepdim=True)
        likely = torch.where((foreground >= 0.5 * peaks) & (peaks > 0), foreground / peaks.clamp(min=1e-12), 0.0)
        best, index = likely.max(dim=0)
        label = torch.where(best > 0, index + 1, 0).float()
        return F.interpolate(label[None, None], shape, mode="nearest")[0, 0].to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# prompts


@dataclass(frozen=True)
class Asked:
    """P prompts: of which image ``canvas``, slice ``cell`` and class ``(P,)`` each is, and ``pixels``, in [0, 1].

    pixels: ``(P, 2, 2)`` the corners of boxes, or ``(P, 1, 2)`` clicks, each (x, y).
    """

    canvas: Tensor
    cell: Tensor
    label: Tensor
    pixels: Tensor


class Prompting(Prior):
    """Asks SAM about each region of an image and puts the answers together as one mask a class."""

    def __init__(self, kind: Kind, classes: int, jitter: float, best_mask: bool = False) -> None:
        super().__init__(classes)
        self.kind = kind
        self.jitter = jitter
        self.best_mask = best_mask

    def forward(self, model: Promptable, images: Tensor, regions: Tensor | None) -> Tensor:
        """Logits ``(B, C, s, s)`` of images ``(B, 3, S, S)`` whose pixels are numbered ``(B, R, R)``.

        Without regions, or where no image shows a class, each image is asked about every class by its whole frame.
        """
        embedding = model.image_encoder(images)
        regions = None if regions is None else regions.flatten(0, -3)
        asked = None if regions is None else self._ask(regions)
        if asked is None:
            regions, asked = None, self._frames(len(embedding), embedding.device)
        size = images.shape[-1]
        passes = zip(*(torch.split(part, PROMPTS_PER_PASS) for part in (asked.canvas, asked.pixels)), strict=True)
        masks = torch.cat([self._answer(model, embedding[canvas], size * pixels) for canvas, pixels in passes])
        return self._together(masks, asked, len(embedding), regions)

    def _answer(self, model: Promptable, embedding: Tensor, pixels: Tensor) -> Tensor:
        """Masks ``(P, s, s)`` for prompts in pixels of the image, one on each embedding."""
        ones = torch.ones(pixels.shape[:2], dtype=torch.long, device=pixels.device)
        if self.kind == "box":
            masks, iou = model.ask(embedding, boxes=pixels.flatten(1))
        else:
            masks, iou = model.ask(embedding, points=(pixels, ones))
        if not self.best_mask:
            return masks[:, 0]
        return masks[torch.arange(len(masks), device=masks.device), 1 + iou[:, 1:].argmax(dim=1)]

    def _ask(self, regions: Tensor) -> Asked | None:
        """A prompt for each region of a class on each image, None if there is none."""
        inside = regions - FIRST
        shown = (inside >= 0) & (inside % self.classes > 0)
        canvas, y, x = shown.nonzero(as_tuple=True)
        if len(canvas) == 0:
            return None
        span = int(inside.max()) + 1
        keys, group = torch.unique(canvas * span + inside[shown], return_inverse=True)
        side = regions.shape[-1]
        points = torch.stack([x, y], dim=1).float()
        pixels = self._boxes(points, group, len(keys), side) if self.kind == "box" else self._clicks(points, group)
        inside = keys % span
        return Asked(keys // span, inside // self.classes, inside % self.classes, pixels / side)

    def _boxes(self, points: Tensor, group: Tensor, count: int, side: int) -> Tensor:
        """The box around each group of pixels, its edges moved outward at random in training."""
        index = group.unsqueeze(1).expand(-1, 2)
        low, high = (points.new_zeros(count, 2).scatter_reduce(0, index, points + end, how, include_self=False)
                     for end, how in ((0, "amin"), (1, "amax")))  # fmt: skip
        if self.training:
            move = self.jitter * side
            low, high = low - move * torch.rand_like(low), high + move * torch.rand_like(high)
        return torch.stack([low, high], dim=1).clamp(0, side)

    def _clicks(self, points: Tensor, group: Tensor) -> Tensor:
        """A pixel of each group: any in training, else the one nearest to the middle of the group."""
        if self.training:
            rank = torch.rand_like(points[:, 0])
        else:
            sizes = torch.bincount(group).unsqueeze(1)
            middle = torch.zeros(len(sizes), 2, device=points.device).index_add_(0, group, points) / sizes
            rank = (points - middle[group]).square().sum(dim=1)
            rank = rank / (rank.max() + 1)
        order = (group + 0.999 * rank.double()).argsort()
        firsts = torch.searchsorted(group[order], torch.arange(int(group.max()) + 1, device=group.device))
        return points[order[firsts]].unsqueeze(1)

    def _frames(self, count: int, device: torch.device) -> Asked:
        """The whole of each image, or its middle, for every class."""
        each = torch.arange(count * (self.classes - 1), device=device)
        frame = [[0.0, 0.0], [1.0, 1.0]] if self.kind == "box" else [[0.5, 0.5]]
        pixels = torch.tensor(frame, device=device).expand(len(each), -1, -1)
        return Asked(each // (self.classes - 1), 0 * each, 1 + each % (self.classes - 1), pixels)

    def _together(self, masks: Tensor, asked: Asked, count: int, regions: Tensor | None) -> Tensor:
        """Each pixel takes the masks that were asked for its own slice; the background's logit is 0."""
        side = masks.shape[-1]
        along = torch.arange(side, device=masks.device)
        if regions is None:
            cells, most = torch.zeros(count, side, side, dtype=torch.long, device=masks.device), 1
        else:
            pick = along * regions.shape[-1] // side
            cells = ((regions[:, pick][:, :, pick] - FIRST) // self.classes).clamp(min=0).long()
            most = int(max(cells.max(), asked.cell.max())) + 1
        prompt = torch.full((count, most, self.classes - 1), len(masks), device=masks.device)
        prompt[asked.canvas, asked.cell.long(), asked.label.long() - 1] = torch.arange(len(masks), device=masks.device)
        chosen = prompt[torch.arange(count, device=masks.device).view(-1, 1, 1), cells]  # (B, s, s, C - 1)
        planes = torch.cat([masks, masks.new_full((1, side, side), ABSENT)])
        logits = planes[chosen, along.view(1, -1, 1, 1), along.view(1, 1, -1, 1)]
        return F.pad(logits, (1, 0)).permute(0, 3, 1, 2)
