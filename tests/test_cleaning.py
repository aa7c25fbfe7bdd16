"""Cleaning lists before it removes, and removes nothing that is needed, in use, or somebody else's."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cfrbench import cleaning
from cfrbench.contracts import StageTask
from cfrbench.store import Store
from tests.children import CONTEXT, flip, make


def test_clean_lists_first_and_removes_only_what_no_run_needs(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for key in ("kept", "loose", "hurt", "busy"):
        store.ensure(StageTask("tune", key, key), make)
    flip(store.folder("tune", "hurt") / "small.bin")
    assert store.find_verified("tune", "hurt") is None
    for key, days in (("old", 9), ("new", 0)):
        (store.root / "partial" / f"pseudo-label-{key}").mkdir()
        os.utime(store.root / "partial" / f"pseudo-label-{key}", (time.time() - days * 86400,) * 2)
    (store.root / "partial" / "tune-kept").mkdir()
    foreign = store.root / "my" / "thesis" / "draft.tex"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")

    listed = cleaning.unused(store, {"kept"})
    reasons = {item.path.name.partition("-1")[0]: item.reason for item in listed}
    assert reasons == {
        "loose": "no run refers to it",
        "busy": "no run refers to it",
        "tune-hurt": "damaged and set aside",
        "pseudo-label-old": "unfinished, untouched for 9 days",
        "tune-kept": "its stage is finished",
    }
    assert store.find("tune", "loose") is not None, "listing changes nothing"
    assert sum(item.bytes for item in listed) > 3_000_000

    held = [item for item in listed if item.key == "busy"]
    with CONTEXT.Pool(1) as pool:
        with store.lock("busy"):
            assert pool.apply(cleaning.remove, (store, held)) == 0
        assert cleaning.remove(store, listed) == sum(item.bytes for item in listed)
    assert cleaning.remove(store, listed) == 0, "a second clean finds nothing left to do"
    assert cleaning.unused(store, {"kept"}) == []
    store.ensure(StageTask("tune", "kept", "kept"), lambda draft: pytest.fail("was removed")).verify()
    assert foreign.read_text() == "precious"
    assert (store.root / "partial" / "pseudo-label-new").is_dir()
