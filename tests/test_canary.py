"""The truth of unlabelled cases cannot reach training: replace it by noise, and nothing changes, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Prepared:
    """A data source with the labeller and the pseudo-labels that any method is guided by."""

    bench: pipeline.Bench
    settings: Settings
    pseudo: pipeline.PseudoLabels
    left_behind: dict[str, Tensor]

    def trained(self, method_name: str, **options: Any) -> dict[str, Tensor]:
        """Everything that training leaves behind: fine-tuned tensors, pseudo-labels, all networks of the method."""
        split = self.bench.source.split()
        segmenter, classes = make("net", "vnet", self.settings), self.bench.source.num_classes

        def method() -> SSLMethod:
            cls = registry.load("ssl", method_name)
            built: SSLMethod = cls(lambda: segmenter.build(1, classes), classes, cls.Config(**options))
            return built

        labelled, unlabelled = split.labelled(LABELLED), split.unlabelled(LABELLED)
        result = pipeline.retrain(self.bench, method, labelled, unlabelled, self.pseudo.working, seed=3)
        return {**self.left_behind, **result.state_dict()}


def prepared(source: DataSource, settings: Settings) -> Prepared:
    """Fine-tune and label the unlabelled volumes."""
    bench, split = pipeline.Bench.of(source, settings), source.split()
    tuner, foundation = make("tune", "lora", settings), make("model", "tiny", settings)
    labelled = split.labelled(LABELLED)
    labeller = pipeline.fine_tune(bench, labelled, make("concat", "grid", settings), foundation, tuner, seed=3)
    pseudo = pipeline.pseudo_label(bench, labeller, split.unlabelled(LABELLED))
    return Prepared(bench, settings, pseudo, {**tuner.export(labeller.network.model), **pseudo.stored})


@pytest.fixture(scope="module")
def both() -> tuple[Prepared, Prepared]:
    """The data as it is, and with noise for the truth of its unlabelled cases."""
    source, settings = phantom()
    blind, _ = phantom()
    return prepared(source, settings), prepared(noisy_truth(blind), settings)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in registry.names("ssl")),
    ("self-training", {"labels": "crop"}),
    ("acmt", {"criterion": "prototype"}),
    ("acmt", {"criterion": "confident-learning"}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_training_never_sees_the_truth_of_unlabelled_cases(
    both: tuple[Prepared, Prepared], name: str, options: dict[str, Any]
) -> None:
    first, second = (side.trained(name, **options) for side in both)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


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
    first, second = (prepared(side, settings).trained("mt") for side in (source, blind))
    assert any(not torch.equal(first[name], second[name]) for name in first)
