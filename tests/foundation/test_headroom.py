"""When memory runs out, one paragraph says what to lower, and everything it names exists."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from cfrbench import pipeline, registry
from cfrbench.config import RunConfig, Settings, override, parse_value
from cfrbench.errors import CfrbenchError
from cfrbench.headroom import labelling_advice, memory_advice, tuning_advice
from cfrbench.recipes import open_source

SAM: Any = registry.load("model", "sam-vit-b")


def test_a_failed_allocation_becomes_advice() -> None:
    with pytest.raises(CfrbenchError, match=r"Memory ran out \(.*\)\. Lower it\."), memory_advice(lambda: "Lower it."):
        torch.empty(1 << 58)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
     RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)")],
)  # fmt: skip
def test_what_allocators_say_is_known(error: Exception) -> None:
    with pytest.raises(CfrbenchError, match="Memory ran out"), memory_advice(lambda: "Lower it."):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="sizes differ"), memory_advice(lambda: "Lower it."):
        raise RuntimeError("sizes differ")


def advice(model: Any, **values: Any) -> str:
    return tuning_advice(override(Settings(), values), model.name, model.config)


def test_the_cheapest_way_comes_first_and_says_how_much_it_saves() -> None:
    words = advice(SAM(), **{"tuning.batch_size": 4})
    ways = ["tuning.batch_size=1 --set tuning.accumulate=4", "about 25% of the memory", "recompute=true",
            "--precision bf16", "input_size=512"]  # fmt: skip
    assert [words.index(way) for way in ways] == sorted(words.index(way) for way in ways)


def test_what_is_already_low_is_not_advised() -> None:
    model = SAM(SAM.Config(input_size=64, recompute=True))
    words = advice(model, **{"tuning.batch_size": 1, "compute.precision": "bf16"})
    assert not any(way in words for way in ("batch_size", "recompute", "precision", "input_size"))
    assert "smaller foundation model" in words


@pytest.mark.parametrize("name", registry.names("model"))
def test_every_setting_that_is_named_exists(name: str) -> None:
    model = registry.load("model", name)
    settings = override(Settings(), {"tuning.batch_size": 2})
    words = tuning_advice(settings, name, model().config) + labelling_advice(settings, name, model().config)
    named = re.findall(r"--set ([\w.-]+)=(\w+)", words)
    assert named
    for key, value in named:
        if key.startswith("model."):
            assert model.Config(**{key.rpartition(".")[2]: parse_value(value)})
        else:
            override(Settings(), {key: parse_value(value)})


def test_a_fine_tuning_that_runs_out_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes")

    values = {"data.phantom.train": 2, "data.phantom.test": 1, "data.phantom.shape": (24, 16, 8)}
    source = open_source("phantom", None, values)
    bench = pipeline.Bench.of(source, RunConfig(preset="smoke", set=values).settings(source.protocol("smoke")))
    monkeypatch.setattr(pipeline, "fit", burst)
    parts = [registry.load(kind, name)() for kind, name in (("concat", "grid"), ("model", "tiny"), ("tune", "lora"))]
    with pytest.raises(CfrbenchError, match=r"Memory ran out.*allocate 8589934592.*Lower the need of a fine-tun"):
        pipeline.fine_tune(bench, list(source.split().train)[:1], *parts, seed=0)
