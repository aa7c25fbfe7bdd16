"""Fine-tuning and pseudo-labels under the strategies whose plans change: by the progress of training, or per canvas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfrbench import pipeline, registry
from cfrbench.config import RunConfig
from cfrbench.contracts import Progress
from cfrbench.recipes import open_source
from cfrbench.tuning import Labeller, TuningTrainee
from cfrbench.volume import IGNORE

VALUES: dict[str, Any] = {
    "data.phantom.train": 2, "data.phantom.test": 1, "data.phantom.shape": (32, 32, 16), "tuning.steps": 3,
}  # fmt: skip


def bench() -> tuple[pipeline.Bench, list[str]]:
    source = open_source("phantom", None, VALUES)
    settings = RunConfig(preset="smoke", set=VALUES).settings(source.protocol("smoke"))
    return pipeline.Bench.of(source, settings), list(source.split().train)


def make(kind: str, name: str) -> Any:
    return registry.load(kind, name)()


def tuned(name: str) -> tuple[pipeline.Bench, Labeller, dict[str, torch.Tensor]]:
    home, cases = bench()
    tuner = make("tune", "lora")
    labeller = pipeline.fine_tune(home, cases[:1], make("concat", name), make("model", "tiny"), tuner, seed=1)
    return home, labeller, tuner.export(labeller.network.model)


@pytest.mark.parametrize("name", ["natural-mix", "patches", "tri-planar"])
def test_it_trains_labels_and_repeats_bit_for_bit(name: str) -> None:
    home, labeller, tensors = tuned(name)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    again = tuned(name)[2]
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    masks = pipeline.pseudo_label(home, labeller, bench()[1][1:]).stored
    assert [tuple(mask.shape) for mask in masks.values()] == [(32, 32, 16)]


def test_steps_with_photographs_alone_teach_nothing_and_later_ones_teach_every_slice() -> None:
    home, cases = bench()
    tuner, strategy, model = make("tune", "lora"), make("concat", "natural-mix"), make("model", "tiny")
    labeller, parameters = pipeline.adapted(home, strategy, model, tuner, 1)
    labelled = [home.library.labelled(cases[0])]
    trainee = TuningTrainee(labeller, parameters, tuner, labelled, home.tuning_patch, False, 1)
    depth = home.tuning_patch[2]
    taught = []
    for step in range(depth + 1):
        _, labels = trainee.canvases(Progress(step, depth + 1))
        taught.append(int((labels != IGNORE).sum()) / labels.shape[0])
    height, width, _ = home.tuning_patch
    assert taught == [height * width * k for k in range(depth + 1)]
    loss = trainee.losses(Progress(0, depth + 1))["segmentation"]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert bool(torch.isfinite(loss))
    assert all(float(g.abs().max()) < 1e-9 for g in gradients if g is not None)
