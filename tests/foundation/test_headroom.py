"""When memory runs out, one paragraph says what to lower, and everything it names exists."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from cfrbench import pipeline, registry, stages
from cfrbench.config import RunConfig, Settings, override, parse_value
from cfrbench.contracts import Promptable
from cfrbench.errors import CfrbenchError, OutOfMemory
from cfrbench.files import read_log
from cfrbench.headroom import labelling_advice, lean_if_needed, memory_advice, training_advice, tuning_advice
from cfrbench.lean import recompute_blocks
from cfrbench.recipes import WEIGHTS, open_source, study_of
from cfrbench.stages import StageWork
from cfrbench.store import Store
from cfrbench_foundation.tiny import TinySam

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
    words += training_advice(settings)
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


# once more in less memory -------------------------------------------------------------------------------------------

VALUES = {"data.phantom.train": 3, "data.phantom.test": 1, "data.phantom.shape": [24, 16, 8], "tuning.steps": 4}
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Hungry(TinySam):
    """A toy SAM that can recompute its blocks; how often its encoder may keep them for backward is counted down."""

    allowed = 0

    class Config(TinySam.Config):
        recompute: bool = False

    config: Config

    def architecture(self, num_classes: int) -> Promptable:
        model = super().architecture(num_classes)
        if self.config.recompute:
            recompute_blocks(model.image_encoder)
        else:
            model.image_encoder.register_forward_pre_hook(self._keep)
        return model

    def _keep(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            Hungry.allowed -= 1
            if Hungry.allowed < 0:
                raise torch.OutOfMemoryError(FULL)


def fine_tuned(store: Path, monkeypatch: pytest.MonkeyPatch, model: type[TinySam], allowed: int) -> tuple[bytes, Any]:
    """The weights that a fine-tuning of four steps leaves, every step saved, and its log."""
    make = stages.make

    def made(kind: str, plugin: Any, *arguments: Any) -> Any:
        return model(model.Config.model_validate(plugin["options"])) if kind == "model" else make(
            kind, plugin, *arguments)  # fmt: skip

    monkeypatch.setattr(stages, "make", made)
    monkeypatch.setattr(Hungry, "allowed", allowed)
    task = study_of(RunConfig(preset="smoke", set=VALUES)).tune(1, 0)
    StageWork(store, None, 0.0)(task)
    artifact = Store(store).find("tune", task.key)
    assert artifact is not None
    return artifact.path(WEIGHTS).read_bytes(), read_log(artifact.folder / "log.jsonl")


def test_a_fine_tuning_that_runs_out_goes_on_with_recomputed_blocks_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, calm = fine_tuned(tmp_path / "calm", monkeypatch, Hungry, allowed=100)
    found, log = fine_tuned(tmp_path / "full", monkeypatch, Hungry, allowed=2)
    assert found == expected
    assert "recomputing" not in {event["event"] for event in calm}
    (event,) = [event for event in log if event["event"] == "recomputing"]
    assert FULL in event["reason"]
    assert [event["step"] for event in log if event["event"] == "step"] == [1, 2, 3, 4], "it began anew"


def test_without_a_leaner_way_it_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hungry, "recomputing", lambda self: None)
    with pytest.raises(OutOfMemory, match=r"Tried to allocate 2.00 GiB.*Lower the need of a fine-tuning"):
        fine_tuned(tmp_path, monkeypatch, Hungry, allowed=2)


def test_the_second_attempt_begins_without_the_tensors_of_the_first() -> None:
    held: list[Any] = []

    def attempt(way: str) -> str:
        tensor = torch.zeros(1)
        held.append(weakref.ref(tensor))
        if way == "usual":
            raise OutOfMemory("full")
        assert held[0]() is None, "the failed attempt is still in memory"
        return way

    heard: list[str] = []
    assert lean_if_needed(attempt, "usual", "lean", heard.append) == "lean"
    assert heard == ["full"]


@pytest.mark.parametrize(
    ("stage", "words"),
    [("pseudo_label", "Lower the need of labelling"), ("predict", "Let less run beside this prediction"),
     ("retrain", "lower the need of a training step")],
)  # fmt: skip
def test_every_other_stage_says_what_to_lower(stage: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(torch.nn.Conv3d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError(FULL)

    source = open_source("phantom", None, VALUES)
    bench = pipeline.Bench.of(source, RunConfig(preset="smoke", set=VALUES).settings(source.protocol("smoke")))
    cases = list(source.split().train)
    if stage == "predict":
        with pytest.raises(OutOfMemory, match=words):
            pipeline.predict(bench, Full(1, 2, 1), cases[:1])
    elif stage == "retrain":
        method = registry.load("ssl", "mt")
        with pytest.raises(OutOfMemory, match=words):
            pipeline.retrain(bench, lambda: method(lambda: Full(1, 2, 1), 2), cases[:1], cases[1:], None, 0)
    else:
        parts = [registry.load(kind, name)() for kind, name in (("concat", "grid"), ("model", "tiny"))]
        labeller, _ = pipeline.adapted(bench, *parts, registry.load("tune", "none")(), 0)
        labeller.network.model.image_encoder.forward = Full(1, 2, 1).forward  # type: ignore[method-assign]
        with pytest.raises(OutOfMemory, match=words):
            pipeline.pseudo_label(bench, labeller, cases[:1])
