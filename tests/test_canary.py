"""The truth of unlabelled cases cannot reach training: replace it by noise, and nothing changes, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cfrbench import pipeline, registry
from cfrbench.config import RunConfig, Settings
from cfrbench.contracts import DataSource, SSLMethod
from cfrbench.recipes import open_source
from cfrbench.volume import Volume

LABELLED = 2


def noisy_truth(source: DataSource) -> DataSource:
    """``source`` whose unlabelled cases carry random labels."""
    honest = source.load
    hidden = set(source.split().unlabelled(LABELLED))

    def load(case: str) -> Volume:
        volume = honest(case)
        if case not in hidden:
            return volume
        noise = torch.randint(0, source.num_classes, volume.shape, dtype=torch.uint8)
        return Volume(volume.image, noise, volume.spacing_mm)

    source.load = load  # type: ignore[method-assign]
    return source


def make(kind: str, name: str, settings: Settings, *arguments: Any) -> Any:
    cls = registry.load(kind, name)
    return cls(cls.Config(**settings.options.get(f"{kind}.{name}", {})), *arguments)


def phantom() -> tuple[DataSource, Settings]:
    values = {"data.phantom.train": 5, "data.phantom.test": 1, "data.phantom.shape": (32, 32, 16)}
    source = open_source("phantom", None, values)
    config = RunConfig(preset="smoke", set=values)
    return source, config.settings(source.protocol("smoke"))


def weights(source: DataSource, settings: Settings, method_name: str) -> dict[str, Tensor]:
    """Everything that training leaves behind: fine-tuned tensors, pseudo-labels, all networks of the method."""
    bench = pipeline.Bench.of(source, settings)
    split = source.split()
    labelled, unlabelled = split.labelled(LABELLED), split.unlabelled(LABELLED)
    tuner, foundation = make("tune", "lora", settings), make("model", "tiny", settings)
    labeller = pipeline.fine_tune(bench, labelled, make("concat", "grid", settings), foundation, tuner, seed=3)
    pseudo = pipeline.pseudo_label(bench, labeller, unlabelled)
    segmenter = make("net", "vnet", settings)

    def method() -> SSLMethod:
        cls = registry.load("ssl", method_name)
        classes = source.num_classes
        built: SSLMethod = cls(lambda: segmenter.build(1, classes), classes, cls.Config())
        return built

    trained = pipeline.retrain(bench, method, labelled, unlabelled, pseudo.working, seed=3)
    return {**tuner.export(labeller.network.model), **trained.state_dict(), **pseudo.stored}


@pytest.mark.parametrize("method_name", ["mt", "acmt", "self-training"])
def test_training_never_sees_the_truth_of_unlabelled_cases(method_name: str) -> None:
    source, settings = phantom()
    blind, _ = phantom()
    first = weights(source, settings, method_name)
    second = weights(noisy_truth(blind), settings, method_name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_canary_would_sing() -> None:
    """The same replacement on a labelled case does change the result, so the test above can fail."""
    source, settings = phantom()
    blind, _ = phantom()
    honest = blind.load
    spoilt = blind.split().train[0]

    def load(case: str) -> Volume:
        volume = honest(case)
        assert volume.label is not None
        return Volume(volume.image, 1 - volume.label, volume.spacing_mm) if case == spoilt else volume

    blind.load = load  # type: ignore[method-assign]
    first, second = weights(source, settings, "mt"), weights(blind, settings, "mt")
    assert any(not torch.equal(first[name], second[name]) for name in first)
