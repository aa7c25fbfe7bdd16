"""The store keeps only whole artifacts, computes each once, and says clearly what is wrong with a disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfrbench.artifact import Damaged, Draft
from cfrbench.errors import CfrbenchError, StoreError, UsageError
from cfrbench.files import read_json, read_log
from cfrbench.store import Store
from tests.children import CONTEXT, TASK, content, flip, make, overflow, race, start, write_slowly, write_until_killed


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checksums of TASK's files after an undisturbed computation."""
    return content(Store(tmp_path_factory.mktemp("undisturbed")).ensure(TASK, make))


def nothing_but_the_artifact(store: Store) -> bool:
    return not any((store.root / "partial").iterdir()) and not any((store.root / "damaged").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# whole or absent


def test_an_artifact_remembers_what_made_it(store: Store) -> None:
    def work(draft: Draft) -> None:
        make(draft)
        draft.log.write("step", step=1, loss=float("inf"))
        draft.summary["dice"] = float("nan")

    artifact = store.ensure(TASK, work)
    manifest = artifact.manifest
    assert (manifest["stage"], manifest["key"], manifest["recipe"]) == ("tune", "ab12", {"seed": 0})
    assert manifest["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert manifest["summary"] == {"dice": None}
    assert 0 < manifest["seconds"] < 60
    assert manifest["peak_mib"] > 10
    assert artifact.files == ["log.jsonl", "small.bin", "weights.bin"]
    assert read_log(artifact.path("log.jsonl"))[-1]["loss"] is None
    assert store.find("tune", "ab12") == artifact
    assert nothing_but_the_artifact(store)


def test_a_kill_before_any_change_of_the_disk_leaves_nothing_half(tmp_path: Path, expected: dict[str, str]) -> None:
    survived = False
    number, found_early = 0, 0
    while not survived:
        root = tmp_path / str(number)
        process = start(write_until_killed, root, number)
        process.join()
        survived = process.exitcode == 0
        assert survived or process.exitcode == -9
        store = Store(root)
        artifact = store.find("tune", "ab12")
        assert artifact is None or content(artifact) == expected
        found_early += artifact is not None and not survived
        assert content(store.ensure(TASK, make)) == expected
        assert not any((root / "damaged").iterdir()), "a half artifact was visible"
        number += 1
    assert number > 15, "too few points of death were tried"
    assert found_early > 0, "no process died between completing the artifact and tidying up"


def test_kills_spread_over_time_never_show_half_an_artifact(tmp_path: Path, expected: dict[str, str]) -> None:
    began = time.monotonic()
    Store(tmp_path / "calibration").ensure(TASK, make)
    duration = time.monotonic() - began
    store = Store(tmp_path / "store")
    trials = 20
    for trial in range(trials):
        started = CONTEXT.Event()
        process = start(write_slowly, store.root, started)
        started.wait()
        time.sleep(1.2 * duration * trial / trials)
        process.kill()
        process.join()
        artifact = store.find("tune", "ab12")
        if artifact is not None:
            assert content(artifact) == expected
            store.discard(artifact.folder)
    artifact = store.ensure(TASK, make)
    assert content(artifact) == expected
    assert nothing_but_the_artifact(store)
    assert artifact.manifest["attempts"] >= 1


def test_an_attempt_finds_what_the_killed_one_left_in_its_scratch_folder(store: Store) -> None:
    def fail(draft: Draft) -> None:
        (draft.folder / "checkpoint").write_text("step 7")
        draft.path("half.bin").write_bytes(b"half")
        raise RuntimeError("killed")

    def resume(draft: Draft) -> None:
        assert (draft.folder / "checkpoint").read_text() == "step 7"
        make(draft)

    with pytest.raises(RuntimeError):
        store.ensure(TASK, fail)
    assert store.find("tune", "ab12") is None
    artifact = store.ensure(TASK, resume)
    assert artifact.manifest["attempts"] == 2
    assert "half.bin" not in artifact.files
    assert nothing_but_the_artifact(store)


def test_processes_racing_for_a_stage_compute_it_once(tmp_path: Path) -> None:
    barrier, counter = CONTEXT.Barrier(3), tmp_path / "counter"
    processes = [start(race, tmp_path / "store", barrier, counter) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.read_text() == "computed\n"
    assert len(set(counter.with_suffix(".waiting").read_text().splitlines())) == 2


def test_the_lock_is_reentrant_and_seen_by_those_who_will_not_wait(store: Store) -> None:
    with store.lock("ab12"), store.lock("ab12"), store.lock_if_free("ab12") as mine:
        assert mine
    with store.lock_if_free("ab12") as mine:
        assert mine


# ---------------------------------------------------------------------------------------------------------------------
# damage


def test_a_flipped_byte_is_noticed_set_aside_and_computed_again(store: Store, expected: dict[str, str]) -> None:
    artifact = store.ensure(TASK, make)
    artifact.verify()
    flip(artifact.folder / "weights.bin")
    found = store.find("tune", "ab12")
    assert found is not None, "sizes are equal: a cheap look cannot notice"
    with pytest.raises(Damaged, match=r"weights\.bin was changed after it was written"):
        found.path("weights.bin")
    assert store.find("tune", "ab12") is None
    (aside,) = (store.root / "damaged").iterdir()
    assert "SHA-256" in (aside / "reason.txt").read_text()
    assert content(store.ensure(TASK, make)) == expected


@pytest.mark.parametrize("harm", [
    lambda folder: flip(folder / "manifest.json"),
    lambda folder: (folder / "manifest.json").unlink(),
    lambda folder: (folder / "manifest.json").write_text("[]"),
    lambda folder: (folder / "manifest.json").write_bytes(b""),
    lambda folder: (folder / "small.bin").unlink(),
    lambda folder: (folder / "small.bin").write_bytes(b"short"),
])  # fmt: skip
def test_a_cheap_look_notices_manifest_and_sizes(store: Store, harm: Callable[[Path], Any]) -> None:
    harm(store.ensure(TASK, make).folder)
    assert store.find("tune", "ab12") is None
    assert len(list((store.root / "damaged").iterdir())) == 1
    store.ensure(TASK, make).verify()


def test_an_artifact_under_another_key_is_not_believed(store: Store) -> None:
    folder = store.ensure(TASK, make).folder
    folder.rename(folder.with_name("cd34"))
    assert store.find("tune", "cd34") is None


def test_find_verified_sees_every_byte(store: Store) -> None:
    artifact = store.ensure(TASK, make)
    assert store.find_verified("tune", "ab12") == artifact
    flip(artifact.folder / "small.bin")
    assert store.find_verified("tune", "ab12") is None
    assert store.find_verified("tune", "never") is None


def test_one_who_judged_the_old_artifact_does_not_move_its_sound_successor(store: Store) -> None:
    old = store.ensure(TASK, make)
    old.folder.rename(store.root / "damaged" / "by-another-process")
    new = store.ensure(TASK, make)
    flip(new.folder / "weights.bin")
    with pytest.raises(Damaged):
        old.path("weights.bin")
    assert new.folder.is_dir()


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "..", "/etc/passwd", "a\nb"])
def test_names_cannot_escape(store: Store, name: str) -> None:
    with store.writing(TASK) as draft, pytest.raises(UsageError):
        draft.path(name)
    artifact = store.find("tune", "ab12")
    assert artifact is not None
    with pytest.raises(StoreError):
        artifact.path(name)
    for refused in (
        lambda: store.folder(name, "ab12"),
        lambda: store.folder("tune", name),
        lambda: store.lock(name).__enter__(),
    ):
        with pytest.raises(UsageError):
            refused()


def test_the_store_keeps_its_own_names(store: Store) -> None:
    with store.writing(TASK) as draft, pytest.raises(UsageError):
        draft.path("manifest.json")
    with pytest.raises(UsageError):
        store.folder("runs", "ab12")


# ---------------------------------------------------------------------------------------------------------------------
# disks that refuse


def refuse(code: int) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def test_a_file_in_place_of_the_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match=r"taken: a file stands where a folder is needed.*--store"):
        Store(tmp_path / "taken")


@pytest.mark.parametrize(("code", "words"), [(errno.EROFS, "not allowed"), (errno.EACCES, "not allowed"),
                                             (errno.ENOSPC, "the disk is full")])  # fmt: skip
def test_a_store_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    Store(tmp_path)
    monkeypatch.setattr(Path, "touch", refuse(code))
    with pytest.raises(StoreError, match=words) as caught:
        Store(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_outgrows_the_disk_leaves_no_artifact(tmp_path: Path, expected: dict[str, str]) -> None:
    words = CONTEXT.Queue()
    process = start(overflow, tmp_path / "store", words)
    assert "Cannot write" in words.get(timeout=20)
    process.join()
    store = Store(tmp_path / "store")
    assert store.find("tune", "ab12") is None
    assert content(store.ensure(TASK, make)) == expected


def attempt(store: Store) -> StoreError | None:
    try:
        store.ensure(TASK, make)
    except StoreError as error:
        return error
    return None


def test_whichever_sync_fails_there_is_a_store_error_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    sync, calls = os.fsync, 0

    def full_at(number: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == number + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        return fsync

    for number in range(50):
        store, calls = Store(tmp_path / str(number)), 0
        monkeypatch.setattr(os, "fsync", full_at(number))
        failure = attempt(store)
        if failure is None:
            break
        assert "the disk is full" in str(failure)
        artifact = store.find("tune", "ab12")
        assert artifact is None or content(artifact) == expected
        assert content(store.ensure(TASK, make)) == expected
        assert not any((store.root / "damaged").iterdir())
    assert 4 < number < 49


def test_a_disk_full_inside_the_work_is_a_store_error_and_a_missing_input_is_not(store: Store) -> None:
    def full(draft: Draft) -> None:
        refuse(errno.ENOSPC)()

    def missing(draft: Draft) -> None:
        Path("no such input").read_bytes()

    with pytest.raises(StoreError, match="the disk is full"):
        store.ensure(TASK, full)
    with pytest.raises(FileNotFoundError):
        store.ensure(TASK, missing)
    assert store.find("tune", "ab12") is None


def test_a_lock_that_cannot_be_made_is_a_store_error(store: Store) -> None:
    (store.root / "locks" / "ab12.lock").mkdir()
    with pytest.raises(StoreError, match=r"Cannot lock .*ab12\.lock"), store.lock("ab12"):
        pytest.fail("locked a folder")


# ---------------------------------------------------------------------------------------------------------------------
# runs


def test_runs_are_found_by_name_beginning_hash_and_latest(store: Store) -> None:
    with pytest.raises(UsageError, match="Known: none yet"):
        store.run("latest")
    store.write_run("la-mt", {"cells": [1], "hash": "aaaa11"})
    store.write_run("la-acmt", {"cells": [2], "hash": "aaaa22"})
    store.write_run("phantom", {"loss": float("inf"), "folder": Path("x/y")})
    assert [run["name"] for run in store.runs()] == ["la-mt", "la-acmt", "phantom"]
    assert store.run("la-mt")["cells"] == [1]
    assert store.run("la-a")["cells"] == [2]
    assert store.run("aaaa2")["cells"] == [2]
    assert store.run("latest")["name"] == store.run("p")["name"] == "phantom"
    assert store.run("phantom")["loss"] is None
    with pytest.raises(UsageError, match=r"several runs.*la-mt.*la-acmt"):
        store.run("la-")
    for unknown in ("zz", ""):
        with pytest.raises(UsageError, match="Known: la-mt, la-acmt, phantom"):
            store.run(unknown)
    with pytest.raises(UsageError):
        store.write_run("../run", {})
    store.write_run("la-mt", {"cells": [3]})
    assert store.run("latest")["cells"] == [3]


def test_an_exact_name_wins_over_a_longer_one(store: Store) -> None:
    store.write_run("mt", {"cells": 1})
    store.write_run("mt-2", {"cells": 2})
    assert store.run("mt")["cells"] == 1


def test_a_damaged_run_record_is_named(store: Store) -> None:
    (store.root / "runs" / "old.json").write_text("{")
    with pytest.raises(StoreError, match=r"old\.json is damaged"):
        store.runs()


def test_the_store_loads_without_torch() -> None:
    code = "import cfrbench.store, cfrbench.cleaning, cfrbench.formats, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_manifests_and_messages_fit_a_person(store: Store) -> None:
    artifact = store.ensure(TASK, make)
    assert read_json(artifact.folder / "manifest.json") == artifact.manifest
    with pytest.raises(CfrbenchError, match=r"holds no file 'nothing', only log\.jsonl, small\.bin, weights\.bin"):
        artifact.path("nothing")
