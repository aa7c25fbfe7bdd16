"""Steps 1 and 2 of the paper: lay labelled crops out as images, fine-tune the foundation model, label the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfrbench.canvas import resize_canvas, resize_logits, rotflip_canvas
from cfrbench.compute import Compute
from cfrbench.config import Triple, TuningSection
from cfrbench.contracts import ConcatStrategy, FineTuner, FoundationModel, Progress, Promptable
from cfrbench.intensity import augment_intensity
from cfrbench.jitter import draw_affine, warp_image, warp_label
from cfrbench.losses import ce_dice
from cfrbench.prepare import WorkingCase
from cfrbench.sampling import draw_crop, generator, take_crop
from cfrbench.training import Trainee
from cfrbench.volume import IGNORE

#: smoothing of the official Dice loss in fine-tuning (ShumengLI/CFR code/utils/losses.py)
SMOOTH = 1e-10


class CanvasSegmenter(nn.Module):
    """A promptable model that maps canvases ``(B, S, S)`` to logits ``(B, C, S, S)``."""

    def __init__(self, model: Promptable, input_size: int) -> None:
        super().__init__()
        self.model = model
        self.input_size = input_size

    def forward(self, canvases: Tensor) -> Tensor:
        """Resize to the encoder's input, run without prompts, resize the logits back."""
        size = canvases.shape[-1]
        images = resize_canvas(canvases.unsqueeze(1), self.input_size).expand(-1, 3, -1, -1)
        return resize_logits(self.model(images).float(), size)


@dataclass(frozen=True)
class Labeller:
    """A fine-tuned foundation model seen as a 3D segmenter: crops ``(B, 1, h, w, d)`` to logits ``(B, C, h, w, d)``."""

    network: CanvasSegmenter
    foundation: FoundationModel
    concat: ConcatStrategy
    section: TuningSection
    compute: Compute

    @torch.inference_mode()
    def __call__(self, crops: Tensor) -> Tensor:
        """Lay out, segment, take apart. In evaluation mode, without gradient and without augmentation."""
        shape: Triple = (crops.shape[2], crops.shape[3], crops.shape[4])
        layout = self.concat.plan(shape, self.section.canvas, overflow=self.section.overflow)
        canvases = self.concat.forward(self.foundation.normalise(crops[:, 0].float()), layout, 0.0)  # (B, N, S, S)
        with self.compute.autocast():
            logits = self.network(canvases.flatten(0, 1).to(self.compute.device))  # (B * N, C, S, S)
        logits = logits.unflatten(0, (crops.shape[0], layout.count)).transpose(1, 2)  # (B, C, N, S, S)
        return self.concat.inverse(logits, layout)


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

    def parameters(self) -> list[nn.Parameter]:
        """What the fine-tuner trains."""
        return self._parameters

    def losses(self, progress: Progress) -> dict[str, Tensor]:
        """0.5 (CE + Dice) at canvas resolution; 255 is ignored by CE and counted by Dice, as in the official code."""
        canvases, labels = self.canvases(progress.step)
        self.network.train()
        compute = self.labeller.compute
        with compute.autocast():
            logits = self.network(canvases.to(compute.device))
        return {"segmentation": ce_dice(logits, labels.to(compute.device), smooth=SMOOTH)}

    def canvases(self, step: int) -> tuple[Tensor, Tensor]:
        """The augmented canvases ``(B, S, S)`` and labels of one step; a pure function of (seed, step)."""
        section, concat = self.labeller.section, self.labeller.concat
        pairs = [self._crop(step, item) for item in range(section.batch_size)]
        rng = generator(self.seed, "tuning-augment", step)
        foundation = self.labeller.foundation
        images = foundation.normalise(torch.stack([image for image, _ in pairs]))
        mode = foundation.intensity if section.intensity == "auto" else section.intensity
        images = augment_intensity(images, mode, section.intensity_rate, rng)
        shape: Triple = (images.shape[1], images.shape[2], images.shape[3])
        layout = concat.plan(shape, section.canvas, overflow=section.overflow, draw=step)
        image_canvases = concat.forward(images, layout, 0.0).flatten(0, 1)
        label_canvases = concat.forward(torch.stack([label for _, label in pairs]), layout, IGNORE).flatten(0, 1)
        if not section.rotflip_canvas:
            return image_canvases, label_canvases
        # Each canvas its own turn and flip; always a flip, as in the official code.
        turns = [(int(rng.integers(4)), int(rng.integers(2))) for _ in image_canvases]
        images, labels = (
            torch.stack([rotflip_canvas(canvas, *turn) for canvas, turn in zip(stack, turns, strict=True)])
            for stack in (image_canvases, label_canvases)
        )
        return images, labels

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

    def state(self) -> dict[str, Tensor]:
        """What the fine-tuner exports: everything that training changes."""
        return self.tuner.export(self.network.model)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put an exported state back."""
        self.tuner.restore(self.network.model, state)
