"""Training state survives kills whole; signals are heard between two steps and never lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from cfrbench.checkpoint import Checkpointer, Stop, graceful_stop
from cfrbench.errors import Interrupted, StoreError
from cfrbench.files import JsonLog, read_log
from tests.children import checkpoint_forever, checkpoint_until_killed, start, state_of, train_until_stopped

Make = Callable[..., Checkpointer]


@pytest.fixture
def checkpointer() -> Iterator[Make]:
    """Makes checkpointers whose logs are closed in the end."""
    with ExitStack() as stack:

        def make(folder: Path, every_seconds: float = 1.0) -> Checkpointer:
            log = JsonLog(folder / "log.jsonl")
            stack.callback(log.close)
            return Checkpointer(folder, every_seconds, log)

        yield make


def is_state_of(step: int, state: dict[str, object]) -> bool:
    return repr(state) == repr(state_of(step)) and torch.equal(state["net"]["weight"], state_of(step)["net"]["weight"])  # type: ignore[index]


def events(folder: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in read_log(folder / "log.jsonl")]


def test_the_newest_state_comes_back_and_two_are_kept(checkpointer: Make, tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    assert saver.latest() is None
    for step in (3, 20, 100):
        saver.save(step, state_of(step))
    found = checkpointer(tmp_path).latest()
    assert found is not None
    assert found[0] == 100
    assert is_state_of(100, found[1])
    assert len(list(tmp_path.glob("*.pt"))) == 2
    assert events(tmp_path)[-2:] == [("checkpoint_begin", 100), ("checkpoint_end", 100)]


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty"])
def test_a_damaged_newest_one_is_skipped_with_a_line_in_the_log(checkpointer: Make, tmp_path: Path, harm: str) -> None:
    saver = checkpointer(tmp_path)
    saver.save(1, state_of(1))
    saver.save(2, state_of(2))
    newest = max(tmp_path.glob("*.pt"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes({"truncate": data[: len(data) // 2], "flip": data, "empty": b""}[harm]))
    found = saver.latest()
    assert found is not None
    assert found[0] == 1
    assert is_state_of(1, found[1])
    assert events(tmp_path)[-1] == ("checkpoint_damaged", 2)
    saver.save(2, state_of(2))
    again = saver.latest()
    assert again is not None
    assert is_state_of(2, again[1])


def test_a_kill_anywhere_in_a_save_leaves_a_whole_state(checkpointer: Make, tmp_path: Path) -> None:
    number, inside, survived = 0, 0, False
    while not survived:
        folder = tmp_path / str(number)
        folder.mkdir()
        process = start(checkpoint_until_killed, folder, number)
        process.join()
        survived = process.exitcode == 0
        assert survived or process.exitcode == -9
        last = events(folder)[-1]
        inside += last == ("checkpoint_begin", 2)
        saver = checkpointer(folder)
        found = saver.latest()
        assert found is not None
        assert found[0] == 2 if last == ("checkpoint_end", 2) else found[0] in (1, 2)
        assert is_state_of(found[0], found[1])
        saver.save(3, state_of(3))
        assert not list(folder.glob("*.tmp"))
        number += 1
    assert inside >= 2, "the log must prove that processes died inside the save"


def test_kills_spread_over_time_leave_the_newest_whole_state(checkpointer: Make, tmp_path: Path) -> None:
    inside = 0
    for trial in range(10):
        folder = tmp_path / str(trial)
        folder.mkdir()
        process = start(checkpoint_forever, folder)
        while ("checkpoint_end", 2) not in events(folder):
            time.sleep(0.002)
        time.sleep(0.003 * trial)
        process.kill()
        process.join()
        finished = max(step for event, step in events(folder) if event == "checkpoint_end")
        inside += events(folder)[-1][0] == "checkpoint_begin"
        found = checkpointer(folder).latest()
        assert found is not None
        assert found[0] >= finished
        assert is_state_of(found[0], found[1])
    assert inside > 0


def test_due_follows_the_clock(checkpointer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    saver = checkpointer(tmp_path, 20.0)
    assert not saver.due()
    now = 120.0
    assert saver.due()
    saver.save(1, {})
    assert not saver.due()


def test_what_could_not_be_loaded_is_refused_at_saving(checkpointer: Make, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a Path|state\['a'\]\[1\] is a PosixPath"):
        checkpointer(tmp_path).save(1, {"a": [1, Path("x")]})


def test_a_full_disk_is_a_store_error_and_keeps_the_last_state(
    checkpointer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = checkpointer(tmp_path)
    saver.save(1, state_of(1))

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="the disk is full"):
            saver.save(2, state_of(2))
    found = saver.latest()
    assert found is not None
    assert is_state_of(1, found[1])


# ---------------------------------------------------------------------------------------------------------------------
# signals


def asked_twice(number: signal.Signals) -> None:
    with graceful_stop() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert number.name in str(stop.interrupted("after step 3 of 9"))
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_wish_and_the_second_an_order(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        asked_twice(number)
    assert signal.getsignal(number) == before


def asked_without_a_signal() -> None:
    with graceful_stop() as stop:
        stop.ask("cfrbench cancel")
        signal.raise_signal(signal.SIGTERM)  # as from a parent whom another worker told of the same wish
        assert "Stopped by cfrbench cancel after step 3" in str(stop.interrupted("after step 3"))
        signal.raise_signal(signal.SIGINT)


def test_a_signal_after_a_wish_without_one_is_a_wish_still() -> None:
    with pytest.raises(KeyboardInterrupt):
        asked_without_a_signal()


def test_a_wish_nobody_heard_ends_the_block() -> None:
    with pytest.raises(Interrupted, match="same command"), graceful_stop():
        signal.raise_signal(signal.SIGTERM)


def asked_inside(seen: list[Stop]) -> None:
    with graceful_stop() as outer:
        with graceful_stop() as inner:
            signal.raise_signal(signal.SIGINT)
        seen += [outer, inner]


def test_nested_blocks_share_one_wish() -> None:
    seen: list[Stop] = []
    with pytest.raises(Interrupted):
        asked_inside(seen)
    assert seen[0] is seen[1]
    assert seen[0].requested


def failing_after_a_signal() -> None:
    with graceful_stop():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError


def test_other_exceptions_pass_and_handlers_return() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        failing_after_a_signal()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_thread_is_never_asked_to_stop() -> None:
    found: list[Stop] = []

    def work() -> None:
        with graceful_stop() as stop:
            found.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [stop.requested for stop in found] == [False]


def test_a_training_process_saves_when_it_is_terminated(checkpointer: Make, tmp_path: Path) -> None:
    process = start(train_until_stopped, tmp_path)
    while not (tmp_path / "step").exists():
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == Interrupted.exit_code
    found = checkpointer(tmp_path).latest()
    assert found is not None
    assert found[0] == int((tmp_path / "step").read_text())
    assert is_state_of(found[0], found[1])
