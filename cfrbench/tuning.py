"""Steps 1 and 2 of the paper: lay labelled crops out as images, fine-tune the foundation model, label the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfrbench.canvas import resize_canvas, resize_logits, rotflip_canvas, thinned
from cfrbench.compute import Compute
from cfrbench.config import Triple, TuningSection
from cfrbench.contracts import ConcatStrategy, FineTuner, FoundationModel, Layout, Progress, Promptable
from cfrbench.intensity import augment_intensity
from cfrbench.jitter import draw_affine, warp_image, warp_label
from cfrbench.losses import ce_dice
from cfrbench.prepare import WorkingCase
from cfrbench.prompting import Prior, labels_of, regions_of
from cfrbench.sampling import draw_crop, generator, take_crop
from cfrbench.training import Trainee
from cfrbench.volume import IGNORE

#: canvases of one volume that go through the network at once in prediction, so that 80 of them need no 80-fold memory
CANVASES_PER_PASS = 8

#: embeddings of a frozen encoder that are kept where nothing is augmented; 4 MB each for SAM at 1024 pixels
REMEMBERED = 256

#: crops of each labelled case that tell prompts where the classes are
OBSERVED = 8


class CanvasSegmenter(nn.Module):
    """A promptable model that maps canvases ``(B, S, S)`` to logits ``(B, C, S, S)``.

    Models that see volumes take ``(B, D, S, S)``, all slices of each, and return ``(B D, C, S, S)``.
    """

    def __init__(self, model: Promptable, input_size: int) -> None:
        super().__init__()
        self.model = model
        self.input_size = model.input_size or input_size

    def forward(self, canvases: Tensor, regions: Tensor | None = None) -> Tensor:
        """Resize to the encoder's input, run, resize the logits back; ``regions`` as in `Promptable.forward`."""
        return resize_logits(self.low(canvases, regions).float(), canvases.shape[-1])

    def low(self, canvases: Tensor, regions: Tensor | None = None, embeddings: Embeddings | None = None) -> Tensor:
        """The logits as the decoder gives them, ``(B, C, s, s)``; ``embeddings`` are looked up instead of computed."""
        images = resize_canvas(canvases.unsqueeze(-3), self.input_size)
        images = images.expand(*canvases.shape[:-2], 3, -1, -1)
        if embeddings is not None:
            return self.model.decode(embeddings(self.model.image_encoder, images))
        logits: Tensor = self.model(images, regions)
        return logits


class Embeddings:
    """Remembers what a frozen encoder makes of an image, by the image's content; the oldest is forgotten first.

    Images are embedded one by one, so that an embedding does not depend on what it was computed beside. It helps where
    crops come again: where volumes are hardly larger than them.
    """

    def __init__(self, capacity: int = REMEMBERED) -> None:
        self.capacity = capacity
        self.hits = 0
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """The embeddings ``(B, width, g, g)`` of images ``(B, 3, S, S)``."""
        return torch.cat([self._of(encoder, image) for image in torch.split(images, 1)])

    @torch.no_grad()
    def _of(self, encoder: nn.Module, image: Tensor) -> Tensor:
        content = image[0, 0].detach().cpu().contiguous()  # the three channels are one
        key = hashlib.blake2b(content.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
        if key in self._known:
            self.hits += 1
            return self._known[key]
        embedding: Tensor = encoder(image)
        self._known[key] = embedding
        if len(self._known) > self.capacity:
            del self._known[next(iter(self._known))]
        return embedding


@dataclass(frozen=True)
class Labeller:
    """A fine-tuned foundation model seen as a 3D segmenter: crops ``(B, 1, h, w, d)`` to logits ``(B, C, h, w, d)``."""

    network: CanvasSegmenter
    foundation: FoundationModel
    concat: ConcatStrategy
    section: TuningSection
    compute: Compute
    together: bool = False  # whether the model takes all canvases of a crop at once

    @torch.inference_mode()
    def __call__(self, crops: Tensor, labels: Tensor | None = None) -> Tensor:
        """Lay out, segment, take apart. In evaluation mode, without gradient and without augmentation.

        labels: where a model asks for prompts, ``(B, h, w, d)`` to take them from instead of from its prior.
        """
        shape: Triple = (crops.shape[2], crops.shape[3], crops.shape[4])
        layout = self.concat.plan(shape, self.section.canvas, overflow=self.section.overflow)
        canvases = self.concat.forward(self.foundation.normalise(crops[:, 0].float()), layout, 0.0)  # (B, N, S, S)
        regions = self._regions(shape, layout, crops.shape[0], labels)
        with self.compute.autocast():
            logits = torch.cat([self.network(*part) for part in self._passes(canvases, regions)])  # (B * N, C, S, S)
        logits = logits.view(crops.shape[0], layout.count, *logits.shape[1:]).transpose(1, 2)  # (B, C, N, S, S)
        if not self.concat.averages:
            return self.concat.inverse(logits, layout)
        probabilities = self.concat.inverse(logits.softmax(1), layout)
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()

    def _regions(self, shape: Triple, layout: Layout, count: int, labels: Tensor | None) -> Tensor | None:
        """What prompts are drawn from, ``(B, N, S, S)``, if the model asks for any."""
        prior = self.network.model.prompting
        if not isinstance(prior, Prior):
            return None
        if labels is None:
            labels = prior.label(shape).expand(count, *shape)
        return self.concat.forward(regions_of(labels, prior.classes), layout, IGNORE)

    def _passes(self, canvases: Tensor, regions: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
        """What goes through the network at once: one volume of its slices, or a few canvases."""
        stacks = [canvases] if regions is None else [canvases, regions]
        if not self.together:
            stacks = [stack.flatten(0, 1) for stack in stacks]
        size = 1 if self.together else max(canvases.shape[0], CANVASES_PER_PASS)
        for part in zip(*(torch.split(stack, size) for stack in stacks), strict=True):
            yield tuple(tensor.to(self.compute.device) for tensor in part)


class TuningTrainee(Trainee):
    """Fine-tuning on random crops of the labelled volumes (ShumengLI/CFR code/train_finetuning.py)."""

    def __init__(
        self,
        labeller: Labeller,
        parameters: list[nn.Parameter],
        tuner: FineTuner,
        cases: Sequence[WorkingCase],
        patch: Triple,
        rotflip: bool,
        seed: int,
    ) -> None:
        self.network = labeller.network
        self._parameters = parameters
        self.labeller = labeller
        self.tuner = tuner
        self.cases = cases
        self.patch = patch
        self.rotflip = rotflip
        self.seed = seed
        self.prior = self._observed()
        self.embeddings = Embeddings() if self._same_embeddings() else None

    def parameters(self) -> list[nn.Parameter]:
        """What the fine-tuner trains."""
        return self._parameters

    def losses(self, progress: Progress) -> dict[str, Tensor]:
        """0.5 (CE + Dice) at canvas resolution; 255 is ignored by CE and counted by Dice, as in the official code."""
        section, compute = self.labeller.section, self.labeller.compute
        canvases, labels = (part.to(compute.device) for part in self.canvases(progress))
        self.network.train()
        with compute.autocast():
            logits = self.network.low(canvases, None if self.prior is None else labels, self.embeddings)
        if self.prior is not None:
            labels = labels_of(labels, self.prior.classes)
        labels = labels.flatten(0, -3)
        if section.loss_at == "canvas":
            logits = resize_logits(logits.float(), labels.shape[-1])
        else:
            labels = thinned(labels, logits.shape[-1])
        loss = ce_dice(logits, labels, smooth=section.dice_smooth, dice_weight=section.dice_weight)
        return {"segmentation": loss}

    def canvases(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """The augmented canvases ``(N, S, S)`` and labels of one step; a pure function of seed and progress.

        N is the batch size times ``tuning.canvases``, or less if a crop has fewer canvases. A model that takes all
        slices of a crop gets ``(B, D, S, S)``. Where there are prompts, labels are regions.
        """
        section, step = self.labeller.section, self._batch(progress)
        pairs = [self._crop(step, item) for item in range(section.batch_size)]
        rng = generator(self.seed, "tuning-augment", step)
        foundation = self.labeller.foundation
        images = foundation.normalise(torch.stack([image for image, _ in pairs]))
        mode = foundation.intensity if section.intensity == "auto" else section.intensity
        images = augment_intensity(images, mode, section.intensity_rate, rng)
        laid = [self._lay_out(progress, item, images[item], label) for item, (_, label) in enumerate(pairs)]
        join = torch.stack if self.labeller.together else torch.cat
        image_canvases, label_canvases = (join(stack) for stack in zip(*laid, strict=True))
        if not section.rotflip_canvas:
            return image_canvases, label_canvases
        # Each canvas its own turn and flip, all slices of a volume the same; always a flip, as in the official code.
        turns = [(int(rng.integers(4)), int(rng.integers(2))) for _ in image_canvases]
        images, labels = (
            torch.stack([rotflip_canvas(canvas, *turn) for canvas, turn in zip(stack, turns, strict=True)])
            for stack in (image_canvases, label_canvases)
        )
        return images, labels

    def _lay_out(self, progress: Progress, item: int, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Canvases ``(N, S, S)`` of one crop and its label, by a layout that is drawn for this crop alone."""
        section, concat = self.labeller.section, self.labeller.concat
        rng = generator(self.seed, f"tuning-layout-{item}", self._batch(progress))
        label = label if self.prior is None else regions_of(label, self.prior.classes)
        shape: Triple = (image.shape[0], image.shape[1], image.shape[2])
        layout = concat.plan_training(shape, section.canvas, overflow=section.overflow,
                                      draw=int(rng.integers(2**62)), done=progress.step / progress.total)  # fmt: skip
        if layout.count <= section.canvases or self.labeller.together:
            return concat.forward(image, layout, 0.0), concat.forward(label, layout, IGNORE)
        chosen = sorted(int(n) for n in rng.choice(layout.count, section.canvases, replace=False))
        return concat.forward_some(image, layout, 0.0, chosen), concat.forward_some(label, layout, IGNORE, chosen)

    def _crop(self, step: int, item: int) -> tuple[Tensor, Tensor]:
        rng = generator(self.seed, f"tuning-crop-{item}", step)
        case = self.cases[self._case_index(step, item)]
        assert case.label is not None
        draw = draw_crop(case.shape, self.patch, self.rotflip, rng)
        image, label = take_crop(case.image, draw), take_crop(case.label, draw)
        section = self.labeller.section
        if section.rotation_degrees == 0 and section.zoom == 1:
            return image, label
        affine = draw_affine(section.rotation_degrees, section.zoom, rng)
        return warp_image(image, affine), warp_label(label, affine)

    def _case_index(self, step: int, item: int) -> int:
        # Shuffled epochs without a stored generator: place `position` of epoch `epoch` is a function of both.
        position = step * self.labeller.section.batch_size + item
        epoch, place = divmod(position, len(self.cases))
        return int(generator(self.seed, "tuning-order", epoch).permutation(len(self.cases))[place])

    def _batch(self, progress: Progress) -> int:
        """The number of a batch, which seeds it; several make one step if gradients are accumulated."""
        return progress.step * self.labeller.section.accumulate + progress.part

    def _same_embeddings(self) -> bool:
        """Whether the encoder, given the same crop again, sees the same image and says the same of it."""
        section, model = self.labeller.section, self.network.model
        frozen = not any(parameter.requires_grad for parameter in model.image_encoder.parameters())
        intensity = section.intensity != "none" and section.intensity_rate > 0
        moved = self.rotflip or section.rotflip_canvas or section.rotation_degrees > 0 or section.zoom > 1
        return frozen and not intensity and not moved and self.prior is None

    def _observed(self) -> Prior | None:
        """What the model's prompts are drawn from in prediction, shown some crops of every labelled case."""
        prior = self.network.model.prompting
        if not isinstance(prior, Prior):
            return None
        for batch in range(OBSERVED * len(self.cases)):
            prior.observe(self._crop(batch, 0)[1])
        return prior

    def state(self) -> dict[str, Tensor]:
        """What the fine-tuner exports: everything that training changes."""
        return self.tuner.export(self.network.model)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put an exported state back."""
        self.tuner.restore(self.network.model, state)
