"""Every registered plug-in keeps the contract of its kind. A new one is tested by being registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cfrbench import registry
from cfrbench.errors import DataError, WeightsError
from cfrbench.testing import check_concat, check_data, check_model, check_segmenter, check_ssl, check_tuner

NO_DOWNLOAD = ("tiny", "lite-medsam")  # models whose weights come with the package


def small(name: str) -> Any:
    """A foundation model at the smallest useful input."""
    plugin = registry.load("model", name)
    return plugin(plugin.Config(input_size=32 if name == "lite-medsam" else 64))  # LiteMedSAM has 16 times the tokens


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("name", registry.names("ssl"))
def test_ssl_methods(name: str, num_classes: int) -> None:
    check_ssl(registry.load("ssl", name), num_classes=num_classes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("supervised", {"loss": "ce_foreground_dice"}),
        ("mt", {"form": "ssl4mis", "epoch_steps": 150}),
        ("self-training", {"rounds": 1, "weight": 0.5, "ramp": 0.5}),
        ("self-training", {"labels": "crop", "refresh_steps": 2}),
        ("self-training", {"start": "scratch", "threshold": 0.6}),
        ("ua-mt", {"crops": "all", "loss": "ce_foreground_dice", "passes": 2}),
        ("cps", {"crops": "all", "initialisation": "original", "tested": "second"}),
        ("cct", {"decoders": "shared", "perturbations": "cpcl"}),
        ("cct", {"supervised_decoders": "main", "detach_target": True}),
        ("dtc", {"form": "softmax", "ce_weight": 1.0, "absent": "outside"}),
        ("urpc", {"scales": 2, "upsample": "trilinear"}),
        ("acmt", {"criterion": "uncertainty", "passes": 2}),
        ("acmt", {"criterion": "prototype", "prototype_passes": 3}),
        ("acmt", {"criterion": "prototype", "prototype_passes": 3, "entropy_term": "literal"}),
        ("acmt", {"criterion": "prototype", "prototype_passes": 2, "entropy_term": "none"}),
        ("acmt", {"criterion": "confident-learning"}),
        ("acmt", {"criterion": "confident-learning", "pruning": "noise-rate"}),
        ("cpcl", {"form": "loop", "plain_cross_entropy": True}),
        ("cpcl", {"form": "released"}),
        ("cpcl", {"target": "student"}),
        ("fixmatch", {"loss": "ce_dice", "threshold": 0.8}),
        ("entropy-min", {"crops": "all", "epoch_steps": 150}),
    ],
)
def test_other_forms_of_ssl_methods(name: str, options: dict[str, Any]) -> None:
    method = registry.load("ssl", name)
    check_ssl(method, method.Config(**options))


@pytest.mark.parametrize("name", registry.names("concat"))
def test_concatenation_strategies(name: str) -> None:
    check_concat(registry.load("concat", name))


@pytest.mark.parametrize("name", registry.names("net"))
def test_segmenters(name: str) -> None:
    check_segmenter(registry.load("net", name))


@pytest.mark.parametrize("name", registry.names("model"))
def test_foundation_models(name: str, tmp_path: Path) -> None:
    plugin = registry.load("model", name)
    if name in NO_DOWNLOAD:
        check_model(small(name))
        return
    absent = plugin(weights=tmp_path / "absent.pth")
    with pytest.raises(WeightsError, match=r"absent\.pth"):
        absent.build(2)


@pytest.mark.parametrize("model", NO_DOWNLOAD)
@pytest.mark.parametrize("name", registry.names("tune"))
def test_fine_tuners(name: str, model: str) -> None:
    check_tuner(registry.load("tune", name), small(model))


@pytest.mark.parametrize("name", registry.names("data"))
def test_data_sources(name: str) -> None:
    plugin = registry.load("data", name)
    if plugin.synthetic:
        check_data(plugin())
        return
    with pytest.raises(DataError, match="--data-root"):
        plugin().split()


@pytest.mark.realdata
def test_left_atrium(data_folder: Path) -> None:
    check_data(registry.load("data", "la")(root=data_folder / "la"))
