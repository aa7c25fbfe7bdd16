"""How many stages share a GPU or a machine: by what they took before, and by the preset's figure where nobody knows."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfrbench import artifact, compute, sharing, sweep
from cfrbench.config import RunConfig
from cfrbench.contracts import StageTask
from cfrbench.forecast import Rates
from cfrbench.recipes import study_of, task
from cfrbench.sharing import CONTEXT_MIB, MARGIN, jobs_here, side_by_side
from cfrbench.store import Store

PEAKS = st.lists(st.floats(1, 5000), min_size=1, max_size=6)


@settings(deadline=None)
@given(PEAKS, st.floats(1, 20000), st.floats(0, 800))
def test_whichever_stages_meet_they_fit_and_one_more_might_not(peaks: list[float], room: float, beside: float) -> None:
    jobs = side_by_side(peaks, room, beside_mib=beside)
    assert 1 <= jobs <= len(peaks)
    usable = room * (1 - MARGIN)

    def worst(count: int) -> float:
        return max(sum(chosen) + count * beside for chosen in combinations(peaks, count))

    if jobs > 1:
        assert worst(jobs) <= usable * (1 + 1e-9)
    if jobs < len(peaks):
        assert worst(jobs + 1) > usable * (1 - 1e-9)


def fine_tune(seed: int, width: int = 8) -> StageTask:
    recipe = {"data": {"name": "x"}, "seed": seed, "model": {"options": {"width": width}},
              "settings": {"tuning": {"steps": 5}, "compute": {"device": "cuda"}}}  # fmt: skip
    return task("tune", f"fine-tune {seed}", recipe)


def finish(store: Store, stage: StageTask) -> None:
    with store.writing(stage) as draft:
        draft.path("weights").write_bytes(b"w")


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, one with 24,000 MiB free and one with 20,000, 64 cores, memory for everything."""
    monkeypatch.setattr(sharing, "find_device", torch.device)
    monkeypatch.setattr(sharing, "gpus", lambda: [0, 1])
    monkeypatch.setattr(sharing, "free_gpu_mib", {0: 24_000.0, 1: 20_000.0}.__getitem__)
    monkeypatch.setattr(sharing, "room_for_jobs", lambda threads: 64 // threads)
    monkeypatch.setattr(sharing, "available_mib", lambda: 1e6)


def here(rates: Rates, todo: list[StageTask], device: str = "cuda", threads: int = 4) -> int:
    return jobs_here(todo, {}.get, rates, device=device, threads=threads, unknown_gib=12.0)


@pytest.mark.usefixtures("box")
def test_measured_peaks_decide_how_many_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [fine_tune(seed) for seed in range(1, 21)]
    assert here(Rates(), todo) == 2, "of 20,000 MiB, 12 GiB and the context leave no room for a second"
    monkeypatch.setattr(artifact, "peak_gpu_mib", lambda: 3000.0)
    finish(Store(tmp_path), fine_tune(0))
    rates = Rates()
    rates.learn(Store(tmp_path))
    assert int(20_000 * (1 - MARGIN) / (3000 + CONTEXT_MIB)) == 5
    assert here(rates, todo) == 10
    assert here(rates, todo, "cuda:0") == 6
    assert here(rates, todo, threads=16) == 4, "cores are a limit too"
    assert here(rates, [*todo, fine_tune(0, width=64)]) == 4, "one kind that nobody knows is reckoned with 12 GiB"
    assert here(rates, todo, "mps") == 1


@pytest.mark.usefixtures("box")
def test_on_a_cpu_the_memory_of_the_same_stages_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [fine_tune(seed) for seed in range(1, 21)]
    monkeypatch.setattr(sharing, "available_mib", lambda: 40_000.0)
    assert here(Rates(), todo, "cpu", 1) == 2
    monkeypatch.setattr(artifact, "peak_mib", lambda: 4000.0)
    finish(Store(tmp_path), fine_tune(0))
    rates = Rates()
    rates.learn(Store(tmp_path))
    assert here(rates, todo, "cpu", 1) == 9
    assert here(rates, todo[:3], "cpu", 1) == 3


@pytest.mark.usefixtures("box")
def test_a_run_without_jobs_takes_what_its_preset_and_store_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "available_mib", lambda: 7000.0)
    values = {"compute.device": "cpu", "compute.threads": 1, "data.phantom.train": 3, "data.phantom.test": 1}
    plans = {preset: sweep.plan(RunConfig(preset=preset, ssl=("mt",), labels=(1,), bounds=False, set=values), tmp_path)
             for preset in ("smoke", "quick")}  # fmt: skip
    assert sweep.default_jobs(plans["quick"]) == 2, "3 GiB each, as nothing is known"
    assert sweep.default_jobs(plans["quick"], "ray") == 1
    assert sweep.default_jobs(plans["smoke"]) == 1
    monkeypatch.setattr(artifact, "peak_mib", lambda: 900.0)
    for stage in plans["quick"].todo:
        finish(Store(tmp_path), stage)
    assert sweep.default_jobs(plans["quick"]) == 7, "7000 MiB less a tenth, 900 MiB each"


def test_the_newest_stage_of_a_kind_is_believed_and_what_was_set_aside_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    for seed, peak in ((0, 100.0), (1, 200.0), (2, 300.0)):
        monkeypatch.setattr(artifact, "peak_gpu_mib", lambda peak=peak: peak)
        finish(store, fine_tune(seed))
    (store.folder("tune", fine_tune(2).key) / "weights").write_bytes(b"longer")
    assert store.find("tune", fine_tune(2).key) is None
    rates = Rates()
    rates.learn(store)
    cost = rates.cost(fine_tune(9), {}.get)
    assert cost is not None
    assert cost.gpu_mib == 200.0


def test_a_process_may_be_given_a_gpu_of_which_no_key_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    values = {"compute.device": "cuda", "compute.precision": "auto"}
    keys: list[Any] = []
    for gpu in (None, 1):
        monkeypatch.setattr(compute, "_gpu", gpu)
        keys.append(study_of(RunConfig(preset="smoke", set=values)).tune(1, 0).key)
    assert keys[0] == keys[1]
    found = {name: str(compute.find_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")}
    assert found == {"auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}


def test_stages_are_spread_over_gpus_of_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models = ["H100", "T4", "H100"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(models))
    monkeypatch.setattr(torch.cuda, "get_device_name", models.__getitem__)
    assert compute.gpus() == [0, 2]
