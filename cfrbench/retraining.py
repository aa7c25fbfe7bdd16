"""Step 3 of the paper: train any SSL method on labelled and unlabelled crops, with or without pseudo-label guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cfrbench.compute import Compute
from cfrbench.config import TrainingSection
from cfrbench.contracts import Batch, Progress, SSLMethod
from cfrbench.gauges import ClassWatch
from cfrbench.guidance import guidance_loss, guidance_weight
from cfrbench.losses import class_map
from cfrbench.prepare import WorkingCase
from cfrbench.sampling import draw_crop, generator, take_crop, two_stream_batch
from cfrbench.training import Trainee

#: a network and a whole image ``(h, w, d)`` -> probabilities ``(C, h, w, d)``, by sliding windows
Slider = Callable[[nn.Module, Tensor], Tensor]
#: crops ``(U, 1, h, w, d)`` -> logits ``(U, C, h, w, d)``: the fine-tuned foundation model, for online pseudo-labels
CropLabeller = Callable[[Tensor], Tensor]


class RetrainingTrainee(Trainee):
    """One SSL method on one labelled / unlabelled division.

    unlabelled holds images only. pseudo: label maps by case (mode `volume`), or a CropLabeller (mode `online`), or
    None for the baseline, which draws exactly the same batches. class_names, background first: those whose collapse is
    watched.
    """

    def __init__(
        self,
        method: SSLMethod,
        labelled: Sequence[WorkingCase],
        unlabelled: Mapping[str, Tensor],
        pseudo: Mapping[str, Tensor] | CropLabeller | None,
        section: TrainingSection,
        compute: Compute,
        seed: int,
        slide: Slider,
        class_names: Sequence[str] = (),
    ) -> None:
        self.method = method
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.pseudo = pseudo
        self.section = section
        self.compute = compute
        self.seed = seed
        self.slide = slide
        self._watch = ClassWatch(class_names)
        self._known: tuple[Tensor, Tensor] | None = None  # labelled crops of the last batch and their labels
        self._own: dict[str, Tensor] | None = None  # not saved: made anew from the labeller, which is
        self._phase = -1
        self._names = list(unlabelled) if method.uses_unlabelled else []

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of the method that is not frozen; teachers freeze theirs."""
        return [p for p in self.method.parameters() if p.requires_grad]

    def losses(self, progress: Progress) -> dict[str, Tensor]:
        """The method's own losses, and the guidance term if there are pseudo-labels."""
        self.relabel(progress)
        batch = self.batch(progress.step)
        self._known = batch.image[: batch.labelled], batch.label
        self.method.train()
        with self.compute.autocast():
            output = self.method.step(batch, progress)
            losses = dict(output.losses)
            if batch.pseudo is not None:
                weight = guidance_weight(self.section, progress.step, progress.total)
                losses["guidance"] = guidance_loss(output, batch.pseudo, weight)
        return losses

    def after_update(self, progress: Progress) -> None:
        """Let the method move its teacher."""
        self.method.after_update(progress)

    @torch.no_grad()
    def remarks(self, progress: Progress) -> dict[str, float]:
        """Classes that the tested network has lost on labelled crops, looked for a few times in a training."""
        if self._known is not None and self._watch.due(progress.step, progress.total):
            image, label = self._known
            with self.compute.autocast():
                predicted = class_map(self.method.predictor().eval()(image))
            self._watch.look(predicted, label, late=2 * progress.step >= progress.total)
        return self._watch.lost

    def relabel(self, progress: Progress) -> None:
        """Label the whole unlabelled volumes if a phase begins, or goes on after a cut, whose method asks for it."""
        if progress.phase == self._phase or not self.method.relabels:
            return
        network, self._own = self.method.labeller(progress), None
        if network is not None:
            self._own = {case: self._labelled_by(network, image) for case, image in self.unlabelled.items()}
        self._phase = progress.phase

    def _labelled_by(self, network: nn.Module, image: Tensor) -> Tensor:
        return self.method.own_labels(self.slide(network, image).unsqueeze(0))[0]

    def batch(self, step: int) -> Batch:
        """The batch of one step: a pure function of (seed, step), equal for a baseline and its CFR twin."""
        section = self.section
        known_count, unknown_count = section.labelled_batch, section.unlabelled_batch
        if not self._names:  # the supervised bounds fill the whole batch (yulequan/UA-MT code/train_LA.py)
            known_count, unknown_count = known_count + unknown_count, 0
        labelled, unlabelled = list(range(len(self.labelled))), list(range(len(self._names)))
        first, second = two_stream_batch(step, labelled, unlabelled, known_count, unknown_count, self.seed)
        known = [self._labelled_crop(step, slot, index) for slot, index in enumerate(first)]
        unknown = [self._unlabelled_crop(step, slot, index) for slot, index in enumerate(second)]
        image = torch.stack([crop for crop, _ in known] + [crop for crop, _, _ in unknown]).unsqueeze(1)
        label = torch.stack([label for _, label in known])
        pseudo, own = [labels for _, labels, _ in unknown], [labels for _, _, labels in unknown]
        if callable(self.pseudo):
            pseudo = list(class_map(self.pseudo(image[len(label) :])))
        device = self.compute.device
        return Batch(self.compute.batch(image), label.to(device), self._stacked(pseudo), self._stacked(own))

    def _stacked(self, crops: Sequence[Tensor | None]) -> Tensor | None:
        found = [crop for crop in crops if crop is not None]
        return torch.stack(found).to(self.compute.device) if found else None

    def _labelled_crop(self, step: int, slot: int, index: int) -> tuple[Tensor, Tensor]:
        case = self.labelled[index]
        assert case.label is not None
        rng = generator(self.seed, f"labelled-{slot}", step)
        draw = draw_crop(case.shape, self.section.patch, self.section.rotflip, rng)
        return take_crop(case.image, draw), take_crop(case.label, draw)

    def _unlabelled_crop(self, step: int, slot: int, index: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        name = self._names[index]
        image = self.unlabelled[name]
        rng = generator(self.seed, f"unlabelled-{slot}", step)
        height, width, depth = image.shape
        draw = draw_crop((height, width, depth), self.section.patch, self.section.rotflip, rng)
        pseudo = take_crop(self.pseudo[name], draw) if isinstance(self.pseudo, Mapping) else None
        return take_crop(image, draw), pseudo, None if self._own is None else take_crop(self._own[name], draw)

    def state(self) -> dict[str, Tensor]:
        """All networks of the method, teachers and buffers included."""
        return dict(self.method.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a saved state back."""
        self.method.load_state_dict(dict(state))
