"""Every fault planted here must be found by the contract checks; `test_contracts.py` shows that sound plug-ins pass."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.losses import ce_dice, softmax_mse
from cfrbench.testing import check_ssl

MeanTeacher: Any = registry.load("ssl", "mt")
ACMT: Any = registry.load("ssl", "acmt")
SelfTraining: Any = registry.load("ssl", "self-training")


class DetachedLoss(MeanTeacher):
    """The consistency term compares two constants."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        losses = {**output.losses, "consistency": output.losses["consistency"].detach()}
        return StepOutput(losses, output.guided)


class LossOnTheTeacher(MeanTeacher):
    """The student's own weak view is the target of nothing: its softmax sums to one whatever it does."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        whole = output.guided[0].softmax(dim=1).sum(dim=1).mean()
        return StepOutput({**output.losses, "consistency": whole}, output.guided)


class AllOnesMask(ACMT):
    """Selects every voxel, and says so."""

    def _ambiguous(self, image: Tensor, logits: Tensor, progress: Progress) -> Tensor:
        return torch.ones_like(logits[:, :1], dtype=torch.bool)


class AllZerosMask(ACMT):
    """Selects no voxel, so the consistency term is always 0."""

    def _ambiguous(self, image: Tensor, logits: Tensor, progress: Progress) -> Tensor:
        return torch.zeros_like(logits[:, :1], dtype=torch.bool)


class MaskNotApplied(ACMT):
    """Reports the right mask but averages over all voxels."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        everywhere = softmax_mse(output.guided[0], self.teacher(batch.image[batch.labelled :])).mean()
        return StepOutput({**output.losses, "consistency": everywhere}, output.guided, output.masks)


class MaskOfNothing(ACMT):
    """The mask's name is that of no loss."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        return StepOutput(output.losses, output.guided, {"ambiguous": output.masks["consistency"]})


class SoftMask(ACMT):
    """Half-hearted: weights are no mask."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        return StepOutput(output.losses, output.guided, {"consistency": 0.5 * output.masks["consistency"].float()})


class TrainedTeacher(MeanTeacher):
    """Someone forgot to freeze the teacher and to run it without gradient."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.teacher.requires_grad_(True)
        self.teacher.forward = self.teacher.net.forward


class UnfrozenTeacher(MeanTeacher):
    """No gradient reaches the teacher, but weight decay and momentum of the optimiser would."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.teacher.requires_grad_(True)


class TeacherThatStands(MeanTeacher):
    """The moving average is never taken."""

    def after_update(self, progress: Progress) -> None:
        """Nothing."""


class WrongAverage(MeanTeacher):
    """The two weights of the average are swapped."""

    def after_update(self, progress: Progress) -> None:
        with torch.no_grad():
            for average, current in zip(self.teacher.net.parameters(), self.student.parameters(), strict=True):
                average.mul_(0.01).add_(current, alpha=0.99)


class UnevenAverage(MeanTeacher):
    """No decay is configured, but one tensor moves at another pace than the others."""

    class Config(MeanTeacher.Config):  # type: ignore[misc, name-defined]
        ema: ClassVar[None] = None

    def after_update(self, progress: Progress) -> None:
        with torch.no_grad():
            pairs = zip(self.teacher.net.parameters(), self.student.parameters(), strict=True)
            for index, (average, current) in enumerate(pairs):
                average.lerp_(current, 0.5 if index else 0.4)


class EarlyAverage(MeanTeacher):
    """The average is taken in the step, before the update."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        super().after_update(progress)
        return super().step(batch, progress)  # type: ignore[no-any-return]

    def after_update(self, progress: Progress) -> None:
        """Too late."""


class ReadsPseudoLabels(MeanTeacher):
    """Learns from pseudo-labels behind guidance's back."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        if batch.pseudo is None:
            return output
        return StepOutput({**output.losses, "own": ce_dice(output.guided[0], batch.pseudo)}, output.guided)


class DetachedGuided(MeanTeacher):
    """Guidance is added to logits that lead nowhere."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        return StepOutput(output.losses, tuple(logits.detach() for logits in output.guided))


class GuidedByTheTeacher(MeanTeacher):
    """The teacher's logits are named beside the student's."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        return StepOutput(output.losses, (*output.guided, self.teacher(batch.image[batch.labelled :])))


class NothingGuided(MeanTeacher):
    """Uses unlabelled crops but does not say where."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        return StepOutput(super().step(batch, progress).losses)


class GuidesEverything(MeanTeacher):
    """Names the logits of all crops, labelled ones too."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        return StepOutput(output.losses, (self.student(batch.image),))


class OtherRandomness(MeanTeacher):
    """Draws from a generator that the loop does not seed."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        factor = 1.0 + random.random()
        return StepOutput({name: factor * loss for name, loss in output.losses.items()}, output.guided)


class HiddenSnapshot(SelfTraining):
    """The snapshot hangs on a plain attribute, so a checkpoint lacks it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.hidden = [self.snapshot]
        del self.snapshot
        self.__dict__["snapshot"] = self.hidden[0]


class SnapshotWheneverAsked(SelfTraining):
    """A resumed training would label its volumes by another network than an undisturbed one."""

    def labeller(self, progress: Progress) -> nn.Module | None:
        self.snapshot.load_state_dict(self.student.state_dict())
        return super().labeller(progress)  # type: ignore[no-any-return]


class LabelsByTheStudent(SelfTraining):
    """The labels of a resumed training would be those of a student that has learnt more."""

    def labeller(self, progress: Progress) -> nn.Module | None:
        network: nn.Module = self.student
        return network


class SilentLabeller(SelfTraining):
    """Has a labeller that nobody asks for."""

    relabels = False


class NoLabeller(MeanTeacher):
    """Announces labels that never come."""

    relabels = True


class HiddenCounter(MeanTeacher):
    """Counts its steps itself instead of asking `Progress`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen = 0

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        self.seen += 1
        losses = {**output.losses, "consistency": output.losses["consistency"] * self.seen}
        return StepOutput(losses, output.guided)


class ChangesItsBatch(MeanTeacher):
    """Adds noise to the crops in place."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        batch.image.add_(0.1)
        return super().step(batch, progress)  # type: ignore[no-any-return]


class Exploding(MeanTeacher):
    """Divides by the number of voxels of an empty set."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        return StepOutput({**output.losses, "nothing": output.guided[0][:0].mean()}, output.guided)


class InfiniteGradient(MeanTeacher):
    """A finite value whose slope is not: the square root at 0."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        root = (output.guided[0] * 0.0).square().sum().sqrt()
        return StepOutput({**output.losses, "root": root}, output.guided)


class VoxelwiseLoss(MeanTeacher):
    """Forgets to reduce."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        output = super().step(batch, progress)
        return StepOutput({**output.losses, "map": output.guided[0].square()}, output.guided)


class LonelyPredictor(MeanTeacher):
    """Tests a network that is no part of the method."""

    def __init__(self, make_net: Callable[[], nn.Module], *args: Any) -> None:
        super().__init__(make_net, *args)
        self.other = [make_net()]

    def predictor(self) -> nn.Module:
        return self.other[0]


class RandomPredictor(MeanTeacher):
    """Its tested network keeps dropping in eval mode."""

    def __init__(self, make_net: Callable[[], nn.Module], *args: Any) -> None:
        super().__init__(lambda: Noisy(make_net()), *args)


class Noisy(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return torch.nn.functional.dropout(self.net(image))


class NeverUsed(MeanTeacher):
    """Builds a second network that no loss reaches."""

    def __init__(self, make_net: Callable[[], nn.Module], *args: Any) -> None:
        super().__init__(make_net, *args)
        self.spare = make_net()


class Nameless(MeanTeacher):
    """No table could print it."""

    title = ""


FAULTS: list[tuple[type[SSLMethod], str]] = [
    (DetachedLoss, r"have no gradient in the network that is tested: \['consistency'\]"),
    (LossOnTheTeacher, r"have no gradient in the network that is tested: \['consistency'\]"),
    (AllOnesMask, r"\[1.0\] in every voxel of every step"),
    (AllZerosMask, r"have no gradient .*\['consistency'\]"),
    (MaskNotApplied, "voxels that its mask excludes"),
    (MaskOfNothing, "none of its losses"),
    (SoftMask, "a mask is 0 or 1"),
    (TrainedTeacher, "a teacher must not train"),
    (UnfrozenTeacher, "No loss of UnfrozenTeacher reaches"),
    (TeacherThatStands, "never change from their random start"),
    (WrongAverage, "no moving average"),
    (UnevenAverage, "no moving average"),
    (EarlyAverage, "outside `after_update`"),
    (ReadsPseudoLabels, "change with the pseudo-labels"),
    (DetachedGuided, "Guidance has no gradient"),
    (GuidedByTheTeacher, r"guided logits \[1\]"),
    (NothingGuided, "names no logits"),
    (GuidesEverything, "guides logits of shape"),
    (OtherRandomness, "from one seed differ"),
    (HiddenSnapshot, "must be a frozen submodule"),
    (SnapshotWheneverAsked, "inside a phase"),
    (LabelsByTheStudent, "must be a frozen submodule"),
    (SilentLabeller, "does not say `relabels = True`"),
    (NoLabeller, "names no labeller"),
    (HiddenCounter, "kept outside of parameters and buffers"),
    (ChangesItsBatch, "in place"),
    (Exploding, "'nothing' .* is nan"),
    (InfiniteGradient, "gradient that is not finite"),
    (VoxelwiseLoss, "no scalar"),
    (LonelyPredictor, "not a submodule"),
    (RandomPredictor, "random in eval mode"),
    (NeverUsed, "No loss of NeverUsed reaches"),
    (Nameless, "no `title`"),
]


@pytest.mark.parametrize(("method", "sentence"), FAULTS, ids=[method.__name__ for method, _ in FAULTS])
def test_a_faulty_ssl_method_is_found(method: type[SSLMethod], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_ssl(method)
