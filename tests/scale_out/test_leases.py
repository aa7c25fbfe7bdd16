"""Leases: who holds a lock is seen from other machines, whose kernel's locks say nothing, and the dead are replaced."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cfrbench import leases
from cfrbench.errors import StoreError
from cfrbench.store import Store
from tests.children import TASK, make, start


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.02)


def foreign(path: Path, beat: int = 0) -> None:
    """Write the lease of a process on another machine, whose clock is years behind."""
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "kernel": "another", "token": "x", "since": 0.0,
                                "beat": f"{beat:012d}"}) + "\n")  # fmt: skip


def test_a_held_lock_names_its_holder_and_a_released_one_nobody(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lock("ab"), store.lock("ab"):
        found = leases.read(store.lease("ab"))
        assert found
        assert found["kernel"] == leases.kernel()
    assert leases.read(store.lease("ab")) is None


def test_the_holder_renews_it_without_changing_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.02)
    store = Store(tmp_path)
    with store.lock("ab"):
        first = store.lease("ab").read_bytes()
        deadline = time.monotonic() + 20  # a beat that began before this test may sleep for seconds
        while store.lease("ab").read_bytes() == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(store.lease("ab").read_bytes()) == len(first)


def test_a_dead_holder_on_another_machine_is_replaced_and_a_living_one_is_waited_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lease = store.lease(TASK.key)
    foreign(lease)
    alive, over = threading.Event(), threading.Event()

    def beat() -> None:  # lives for three times as long as a dead one would be borne
        for number in range(1, 19):
            foreign(lease, number)
            time.sleep(0.1)
        over.set()
        alive.set()

    threading.Thread(target=beat).start()
    waits = []
    artifact = store.ensure(TASK, make, lambda: waits.append(over.is_set()))
    assert over.is_set(), "it was computed although another machine was still at it"
    assert False in waits
    assert artifact.key == TASK.key
    assert not lease.exists()
    assert list(lease.parent.glob(".*")) == []
    alive.wait()


def test_a_dead_holder_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    process = start(_die_holding, tmp_path)
    process.join()
    assert leases.read(store.lease(TASK.key)), "the process died without a lease"
    began = time.monotonic()
    store.ensure(TASK, make)
    assert time.monotonic() - began < 10
    assert not store.lease(TASK.key).exists()


def _die_holding(root: Path) -> None:
    with Store(root).lock(TASK.key):
        os.kill(os.getpid(), signal.SIGKILL)


def test_those_who_will_not_wait_see_the_lease_of_another_machine(tmp_path: Path) -> None:
    store = Store(tmp_path)
    foreign(store.lease("ab"))
    with store.lock_if_free("ab") as mine:
        assert not mine
    assert (leases.read(store.lease("ab")) or {})["host"] == "elsewhere"
    store.lease("ab").unlink()
    with store.lock_if_free("ab") as mine:
        assert mine


def test_a_lease_that_vanishes_while_it_is_looked_at_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, here = tmp_path / "x.lease", leases.kernel()
    path.write_bytes(leases.Lease(path).line())  # of this machine, so its holder must be dead
    asked: list[bool] = []

    def kernel_after_which_it_is_gone() -> str:
        asked.append(path.exists())
        if len(asked) == 2:  # the first to ask makes a lease of our own
            path.unlink()
        return here

    monkeypatch.setattr(leases, "kernel", kernel_after_which_it_is_gone)
    lease = leases.take_if_free(path)
    assert asked[:2] == [True, True]
    assert lease is not None
    assert lease.mine()
    lease.drop()


def test_one_who_waits_may_give_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    foreign(store.lease("ab"))

    def waiting() -> None:
        raise StoreError("no longer")

    with pytest.raises(StoreError, match="no longer"), store.lock("ab", waiting):
        pass
    store.lease("ab").unlink()
    with store.lock_if_free("ab") as mine:
        assert mine, "the system's lock was kept by the one who gave up"


def test_a_lease_that_another_took_over_is_neither_renewed_nor_removed(tmp_path: Path, caplog: Any) -> None:
    store = Store(tmp_path)
    with store.lock("ab"):
        lease = next(iter(leases._HEART._leases))
        foreign(lease.path)
        assert not lease.beat()
    assert (leases.read(store.lease("ab")) or {})["host"] == "elsewhere"


def test_without_any_lock_of_the_system_leases_let_one_machine_in_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every thread is a machine of its own: leases alone decide, as on a file system without locks.
    monkeypatch.setattr(leases, "kernel", lambda: str(threading.get_ident()))
    path = tmp_path / "x.lease"
    foreign(path)
    inside: list[int] = []
    crowds: list[int] = []

    def turn() -> None:
        lease = leases.take(path, lambda: None)
        inside.append(1)
        crowds.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        lease.drop()

    threads = [threading.Thread(target=turn) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowds == [1] * 6
    assert list(tmp_path.iterdir()) == []
