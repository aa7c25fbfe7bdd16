"""The cases of ``ssl_consistency.npz``, and networks that return stored logits, for golden tests of SSL methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.backbone import Backbone
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from tests.golden.ledger import ledger

book = ledger("ssl_consistency")
CASES = sorted({key.split(".")[0] for key in book.arrays if key.endswith(".base.label")})

#: the official loops ramp over epochs of 150 iterations at any length of training
OFFICIAL = {"epoch_steps": 150}


def cases_of(*groups: str) -> list[tuple[str, str]]:
    """Every (case, group) of these groups that the file holds results of."""
    found = [(case, group) for case in CASES for group in groups if book.has(f"{case}.{group}.loss")]
    assert found, f"no case of {groups}"
    return found


class Stored(nn.Module):
    """Returns stored logits, whatever it sees, and remembers the last of it."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.seen: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        self.seen = image
        return self.logits


class StoredInTurn(nn.Module):
    """Returns the next of several stored logits at each call."""

    def __init__(self, answers: Sequence[Tensor]) -> None:
        super().__init__()
        self.answers = nn.ParameterList(answers)
        self.calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        answer: Tensor = self.answers[self.calls - 1]
        assert len(answer) == len(image)
        return answer


class StoredBackbone(Backbone):
    """Features and maps are the image; the classifier returns stored logits. Heads are put in place by the test."""

    title = "The stored network"
    name = "stored"
    widths = (1, 1, 1, 1, 1)

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.out_conv = Stored(logits)

    def encode(self, image: Tensor) -> list[Tensor]:
        return [image] * len(self.widths)

    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        return list(features[:-1])

    def remove_encoder(self) -> None:
        """It has none."""


def take(key: str) -> Tensor:
    return torch.from_numpy(np.asarray(book.take(key)))


def method(name: str, num_classes: int, *networks: Tensor | nn.Module, **options: Any) -> SSLMethod:
    """The plug-in ``name`` with these networks, in the order it asks for them; a tensor is what `Stored` returns."""
    queue = iter([net if isinstance(net, nn.Module) else Stored(net) for net in networks])
    plugin: type[SSLMethod] = registry.load("ssl", name)
    made = plugin(lambda: next(queue), num_classes, plugin.Config(**options))
    return made.train()


def batch_of(case: str, labelled: int | None = None) -> Batch:
    count = int(take(f"{case}.base.labeled_bs")) if labelled is None else labelled
    return Batch(take(f"{case}.base.volume"), take(f"{case}.base.label")[:count].to(torch.uint8))


def progress_at(step: int, total: int) -> Progress:
    return Progress(step, total, phase_step=step, phase_total=total)


def progress_of(case: str) -> Progress:
    return progress_at(int(take(f"{case}.base.iter_num")), int(take(f"{case}.base.max_iterations")))


def ramp_total(step: int, threshold: float, start: float, stop: float) -> int:
    """The length of training that gives this threshold at this step: the file does not name ACMT's."""
    ramp = (threshold - start) / (stop - start)
    return round(step / (1.0 - math.sqrt(max(-math.log(ramp), 0.0) / 5.0)))


def close(actual: Tensor | float, key: str) -> None:
    """A scalar within 2e-5 of what the file holds."""
    value = actual.detach() if isinstance(actual, Tensor) else actual
    assert float(value) == pytest.approx(float(book.take(key)), rel=2e-5, abs=1e-6)


def map_close(actual: Tensor, key: str) -> None:
    """A map within 1e-6, or 2e-5 of each value."""
    torch.testing.assert_close(actual.detach(), take(key).to(actual.dtype), rtol=2e-5, atol=1e-6)


def total(output: StepOutput) -> Tensor:
    return torch.stack(list(output.losses.values())).sum()


def gradients_close(output: StepOutput, keys: dict[str, nn.Module], extra: Tensor | float = 0.0) -> None:
    """The gradients of the total loss in stored logits, by key within 1e-4 of the largest magnitude."""
    (total(output) + extra).backward()  # type: ignore[no-untyped-call]
    for key, network in keys.items():
        expected = take(key)
        assert isinstance(network, Stored)
        assert network.logits.grad is not None
        assert (network.logits.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), key
