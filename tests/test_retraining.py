"""Re-training: whole volumes labelled between phases, crops that stay together, and resuming anywhere, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.compute import Compute, seed_torch, start
from cfrbench.config import ComputeSection, TrainingSection
from cfrbench.contracts import Batch, Phase, Progress, SSLMethod, StepOutput
from cfrbench.gauges import ClassWatch
from cfrbench.inference import predict_probabilities
from cfrbench.losses import ce_dice, class_map
from cfrbench.prepare import WorkingCase
from cfrbench.retraining import RetrainingTrainee
from cfrbench.training import Schedule, fit, sgd

SHAPE, PATCH = (18, 16, 8), (16, 16, 8)
SECTION = TrainingSection(patch=PATCH, labelled_batch=2, unlabelled_batch=2)


def volume(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    field = torch.linspace(-1.5, 1.5, SHAPE[0])[:, None, None]
    return field + 0.5 * torch.randn(*SHAPE, generator=draw)


def labelled(num_classes: int) -> list[WorkingCase]:
    cuts = torch.linspace(-1.0, 1.0, num_classes + 1)[1:-1]
    images = [volume(seed) for seed in range(2)]
    maps = [torch.bucketize(image, cuts).to(torch.uint8) for image in images]
    return [WorkingCase(f"l{i}", image, label, SHAPE, (1.0, 1.0, 1.0)) for i, (image, label) in enumerate(zip(
        images, maps, strict=True))]  # fmt: skip


UNLABELLED = {f"u{seed}": volume(seed) for seed in (7, 8, 9)}


def computer() -> Compute:
    return start(ComputeSection(device="cpu", threads=1))


def slide(network: nn.Module, image: Tensor) -> Tensor:
    return predict_probabilities(network.eval(), image, PATCH, 4, 4, 2)


def vnet(num_classes: int = 2) -> nn.Module:
    plugin = registry.load("net", "vnet")
    built: nn.Module = plugin(plugin.Config(width=2, depth=2)).build(1, num_classes)
    return built


def trainee_of(method: SSLMethod, *, pseudo: Any = None, seed: int = 0, sliding: Any = slide) -> RetrainingTrainee:
    names = ("background", "organ")
    return RetrainingTrainee(method, labelled(2), UNLABELLED, pseudo, SECTION, computer(), seed, sliding, names)


def made(name: str, seed: int = 0, **options: Any) -> SSLMethod:
    plugin = registry.load("ssl", name)
    seed_torch(seed, "training-init")
    method: SSLMethod = plugin(vnet, 2, plugin.Config(**options))
    method.fit_to(PATCH)
    return method


class Memory:
    """A checkpointer that keeps every step, and goes on from the one it is told."""

    def __init__(self, chosen: tuple[int, Mapping[str, Any]] | None = None) -> None:
        self.chosen = chosen
        self.saved: dict[int, Mapping[str, Any]] = {}

    def due(self) -> bool:
        return True

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        self.saved[step] = copy.deepcopy(dict(state))

    def latest(self) -> tuple[int, Mapping[str, Any]] | None:
        return copy.deepcopy(self.chosen)


def train(method: SSLMethod, memory: Any, steps: int, pseudo: Any = None) -> dict[str, Tensor]:
    trainee = trainee_of(method, pseudo=pseudo)
    schedule = Schedule(steps, lambda step, total: 0.01, method.phases())
    fit(trainee, schedule, sgd(trainee.parameters(), 0.01, 0.9, 1e-4), seed=3, checkpoints=memory)
    return {name: tensor.clone() for name, tensor in trainee.state().items()}


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in registry.names("ssl")),
    ("self-training", {"labels": "crop", "refresh_steps": 1}),
    ("self-training", {"start": "scratch", "threshold": 0.6, "rounds": 1}),
    ("acmt", {"criterion": "uncertainty"}),
    ("acmt", {"criterion": "prototype"}),
    ("acmt", {"criterion": "confident-learning"}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value))
def test_training_cut_anywhere_ends_as_if_it_had_not_been(name: str, options: dict[str, Any]) -> None:
    """A cut inside each phase, and one at each border."""
    pseudo = {case: (image > 0).to(torch.uint8) for case, image in UNLABELLED.items()}
    steps = max(2 * len(made(name, **options).phases()), 3)
    memory = Memory()
    whole = train(made(name, **options), memory, steps, pseudo)
    assert list(memory.saved) == list(range(1, steps + 1))
    for step, state in list(memory.saved.items())[:-1]:
        resumed = train(made(name, seed=1, **options), Memory((step, state)), steps, pseudo)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), f"cut after step {step}"


class Relabels(SSLMethod):
    """Labels volumes as its second and third phase begin, and keeps the batches it was given."""

    name = title = reference = "relabels"
    relabels = True

    def __init__(self, make_net: Any, num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.net, self.frozen = make_net(), make_net().requires_grad_(False)
        self.batches: list[Batch] = []
        self.asked: list[int] = []

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("first"), Phase("second"), Phase("third"))

    def labeller(self, progress: Progress) -> nn.Module | None:
        self.asked.append(progress.step)
        if progress.phase == 0:
            return None
        if progress.phase_step == 0:
            self.frozen.load_state_dict(self.net.state_dict())
        return self.frozen

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        self.batches.append(batch)
        return StepOutput({"supervised": ce_dice(self.net(batch.image)[: batch.labelled], batch.label)})

    def predictor(self) -> nn.Module:
        return self.net


def relabelling() -> tuple[Relabels, list[str], Any]:
    """The method, the images that were slid over, and a labeller that calls what is bright class 1."""
    method, seen = Relabels(vnet, 2), list[str]()

    def bright(network: nn.Module, image: Tensor) -> Tensor:
        assert network is method.frozen
        seen.append(next(case for case, other in UNLABELLED.items() if other is image))
        return torch.stack([-image, image]).softmax(dim=0)

    return method, seen, bright


def test_volumes_are_labelled_once_as_a_phase_begins() -> None:
    method, seen, bright = relabelling()
    trainee = trainee_of(method, sliding=bright)
    fit(trainee, Schedule(6, lambda step, total: 0.01, method.phases()), sgd(trainee.parameters(), 0.01, 0, 0), seed=0)
    assert method.asked == [0, 2, 4]
    assert seen == list(UNLABELLED) * 2
    assert [batch.own is None for batch in method.batches] == [True] * 2 + [False] * 4


def test_own_labels_are_cut_and_turned_with_their_image() -> None:
    method, _, bright = relabelling()
    pseudo = {case: (image > 0.5).to(torch.uint8) for case, image in UNLABELLED.items()}
    trainee = trainee_of(method, sliding=bright, pseudo=pseudo)
    trainee.relabel(Progress(5, 9, 1, 2, 3))
    for step in range(20):
        batch = trainee.batch(step)
        crops = batch.image[batch.labelled :, 0]
        assert batch.own is not None
        assert batch.pseudo is not None
        assert batch.own.dtype == torch.uint8
        assert torch.equal(batch.own, (crops > 0).to(torch.uint8)), "padding has intensity 0 and class 0"
        assert torch.equal(batch.pseudo, (crops > 0.5).to(torch.uint8))


def test_a_method_that_does_not_relabel_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    method = made("mt")
    monkeypatch.setattr(method, "labeller", lambda progress: pytest.fail("asked"))
    trainee = trainee_of(method)
    trainee.losses(Progress(0, 4, 0, 0, 4))
    assert trainee.batch(0).own is None


def test_self_training_learns_what_its_snapshot_says_of_whole_volumes() -> None:
    method: Any = made("self-training", rounds=1)
    trainee, windows = trainee_of(method), dict[str, Tensor]()
    trainee.relabel(Progress(0, 4, 0, 0, 2))
    assert trainee.batch(0).own is None
    background, organ = slide(method.student, UNLABELLED["u7"]).log()
    method.student.out_conv.bias.data[1] -= (organ - background).median()  # now half of the voxels are organ
    trainee.relabel(Progress(2, 4, 1, 0, 2))
    assert all(torch.equal(a, b) for a, b in zip(
        method.snapshot.state_dict().values(), method.student.state_dict().values(), strict=True))  # fmt: skip
    for case, image in UNLABELLED.items():
        windows[case] = class_map(slide(method.student, image)[None])[0]
    assert trainee._own is not None
    assert all(torch.equal(trainee._own[case], windows[case]) for case in UNLABELLED)
    assert any(0 < int(labels.sum()) < labels.numel() for labels in windows.values())


def test_strides_enter_the_key_of_methods_that_relabel_only() -> None:
    from cfrbench.config import RunConfig
    from cfrbench.recipes import Cell, study_of

    small = {"data.phantom.train": 4, "data.phantom.test": 1, "data.phantom.shape": (32, 32, 16)}
    for name in ("mt", "self-training"):
        keys = set()
        for stride in (4, 8):
            config = RunConfig(preset="smoke", ssl=(name,), set={**small, "inference.stride_z": stride})
            keys.add(study_of(config).train(Cell(name, name, "baseline", 1, 3, 0)).key)
        assert len(keys) == (2 if registry.load("ssl", name).relabels else 1)


# ---------------------------------------------------------------------------------------------------------------------
# classes that collapse


@pytest.mark.parametrize("name", ["mt", "self-training", "mcf", "caussl", "ss-net"])
def test_looking_for_lost_classes_changes_no_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = train(made(name), Memory(), 4)
    monkeypatch.setattr(RetrainingTrainee, "remarks", lambda self, progress: {})
    alone = train(made(name), Memory(), 4)
    assert all(torch.equal(watched[key], alone[key]) for key in alone)


def test_a_network_that_names_everything_background_has_lost_its_class() -> None:
    method: Any = made("supervised")
    method.net.out_conv.weight.data.zero_()
    method.net.out_conv.bias.data.copy_(torch.tensor([1.0, 0.0]))
    trainee, told = trainee_of(method), []
    fit(trainee, Schedule(40, lambda step, total: 0.0, method.phases()), sgd(trainee.parameters(), 0.0, 0, 0), seed=0,
        on_step=lambda step, values: told.append(values.get("lost organ")))  # fmt: skip
    assert told[:20] == [None] * 20, "a class that was never found is not missed in the first half"
    assert told[-15:] == [1.0] * 15


def test_a_class_is_lost_after_two_looks_and_found_after_one() -> None:
    watch, label = ClassWatch(("background", "liver", "aorta")), torch.tensor([0, 1, 1, 2])
    both, one = label, torch.tensor([0, 1, 0, 0])
    for predicted, lost in ((both, []), (one, []), (one, ["lost aorta"]), (both, []), (torch.tensor([2, 1, 1, 0]), [])):
        watch.look(predicted, label, late=False)
        assert list(watch.lost) == lost
    for _ in range(3):
        watch.look(one[:3], label[:3], late=True)
    assert watch.lost == {}, "where a class is not labelled it cannot be missed"
