"""A request that was answered before: found without torch, and only if nothing its keys depend on was touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import cfrbench
from cfrbench import finished
from cfrbench.config import RunConfig

SMALL = {"data.phantom.train": 4, "data.phantom.test": 2, "data.phantom.shape": (32, 32, 16)}
REQUEST = RunConfig(preset="smoke", set=SMALL, bounds=False, baseline=False)


@pytest.fixture
def store(tmp_path: Path, finished_store: Path) -> Path:
    """A copy of a store with one remembered run."""
    folder = tmp_path / "store"
    subprocess.run(["cp", "-r", str(finished_store), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def finished_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "store"
    state = finished.state_of(REQUEST, folder)
    finished.remember(cfrbench.run(REQUEST, store=folder).name, state, folder)
    return folder


def test_the_result_is_that_of_planning_again(store: Path) -> None:
    found = finished.recall(finished.state_of(REQUEST, store), store)
    planned = cfrbench.run(REQUEST, store=store)
    assert found is not None
    assert (found.name, found.trained, found.reused, found.facts) == (planned.name, 0, planned.reused, planned.facts)
    pd.testing.assert_frame_equal(found.table(), planned.table())


def _another_request(_: Path) -> RunConfig:
    return REQUEST.model_copy(update={"labels": (2,)})


def _a_data_file(store: Path) -> RunConfig:
    (store / "datasets" / "phantom").mkdir(parents=True)
    (store / "datasets" / "phantom" / "case.npy").write_bytes(b"new")
    return REQUEST


def _a_score_lost(store: Path) -> RunConfig:
    next((store / "score").glob("*/scores.parquet")).write_bytes(b"damaged")
    return REQUEST


def _the_record_lost(store: Path) -> RunConfig:
    next((store / "runs").glob("*.json")).unlink()
    return REQUEST


@pytest.mark.parametrize("touch", [_another_request, _a_data_file, _a_score_lost, _the_record_lost])
def test_whatever_is_touched_makes_it_plan_again(store: Path, touch: Callable[[Path], RunConfig]) -> None:
    request = touch(store)
    assert finished.recall(finished.state_of(request, store), store) is None


def test_a_file_that_an_option_names_is_part_of_the_state(tmp_path: Path) -> None:
    checkpoint = tmp_path / "weights.pth"
    request = REQUEST.model_copy(update={"set": {"model.sam-vit-b.checkpoint": str(checkpoint)}})
    states = [finished.state_of(request, tmp_path)]
    for content in (b"a", b"ab"):
        checkpoint.write_bytes(content)
        states.append(finished.state_of(request, tmp_path))
    os.utime(checkpoint, ns=(0, 0))
    states.append(finished.state_of(request, tmp_path))
    assert len({state["state"] for state in states}) == len(states)
    assert finished.state_of(request, tmp_path) == states[-1]


def test_a_source_of_a_plug_in_is_part_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "cfrbench_guest"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    guest = finished.registry.Plugin("ssl", "guest", "guest", "1", "cfrbench_guest.method")
    monkeypatch.setattr(finished.registry, "discover", lambda: (guest,))
    before = finished.state_of(REQUEST, tmp_path)
    (package / "method.py").write_text("version = 2", encoding="utf-8")
    assert finished.state_of(REQUEST, tmp_path) != before


def test_the_command_line_answers_again_without_torch(store: Path) -> None:
    options = [part for key, value in SMALL.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    command = [
        "cfrbench",
        "run",
        "--preset",
        "smoke",
        "--no-bounds",
        "--no-baseline",
        "--json",
        "--store",
        str(store),
        *options,
    ]
    code = f"""
import sys
sys.argv = {command!r}
from cfrbench.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended
print("torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["stages"]["trained"] == 0
    assert answer["rows"]
    assert done.stderr.splitlines()[-1] == "False"
