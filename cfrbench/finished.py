"""A request that a finished run has answered already: found out from file times alone, without planning it again.

Planning makes objects of every plug-in, which loads torch, only to arrive at the keys it arrived at before. So a
finished run is remembered with the state of everything that keys are the hash of: sources of the program and of all
plug-ins, installed packages, data, weights, files that options name, processor. If any of it has been touched, the
request is planned anew. Nothing is taken from here but the name of a run.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfrbench import registry
from cfrbench.config import RunConfig, digest
from cfrbench.errors import StoreError
from cfrbench.files import read_json, write_json
from cfrbench.machine import computes_bf16, environment
from cfrbench.prepared.form import DATASETS
from cfrbench.results import Result, of_record
from cfrbench.store import Store
from cfrbench.weights import weights_folder

#: beside the record of a finished run: hashes of the request and of the state it was planned in
MARK = ".finished"


def state_of(request: RunConfig, store: Path) -> dict[str, str]:
    """Hashes of a request and of the state of this machine that its keys depend on; take it before planning."""
    here = {
        "environment": environment() | {"accelerator": None},  # known only once torch is loaded
        "bf16": computes_bf16(),
        "gpus": [os.environ.get("CUDA_VISIBLE_DEVICES"), *sorted(map(str, Path("/dev").glob("nvidia[0-9]*")))],
        "packages": [[path, os.stat(path).st_mtime_ns] for path in sys.path if path.endswith("-packages")],
        "files": [found for place in _places(request, store) for found in _files(place)],
    }
    return {"request": digest(request), "state": digest(here)}


def remember(name: str, state: dict[str, str], store: Path) -> None:
    """Note that the run ``name``, whose cells have all been scored, answers the request of ``state``."""
    write_json(store / "runs" / f"{name}{MARK}", state)


def recall(state: dict[str, str], store: Path) -> Result | None:
    """The result of a run that was remembered in this very state, its record renewed; None if there is none.

    None too if a score or the record itself is no longer whole: planning then says what is to be done.
    """
    began = time.monotonic()
    name = next((mark.name.removesuffix(MARK) for mark in (store / "runs").glob(f"*{MARK}") if _is(mark, state)), None)
    if name is None:
        return None
    home = Store(store)
    try:
        record: dict[str, Any] = read_json(home.root / "runs" / f"{name}.json")
        scores = {cell["score"] for cell in record["cells"]}
        whole = not record["failures"] and all(home.find_verified("score", key) for key in scores)
    except (OSError, ValueError, KeyError, StoreError):
        return None
    if not whole:
        return None
    renewed = {key: value for key, value in record.items() if key not in ("name", "hash", "written")}
    renewed |= {"trained": 0, "reused": len(scores), "seconds": time.monotonic() - began}
    home.write_run(name, renewed)
    home.cancel_mark(name).unlink(missing_ok=True)
    return of_record(name, renewed, home)


def _is(mark: Path, state: dict[str, str]) -> bool:
    try:
        return bool(read_json(mark) == state)
    except (OSError, ValueError):
        return False


def _places(request: RunConfig, store: Path) -> Iterator[Path]:
    """Every file and folder that keys may depend on."""
    tops = {plugin.module.partition(".")[0] for plugin in registry.discover()} | {"cfrbench"}
    for top in sorted(tops):
        spec = importlib.util.find_spec(top)  # of a package that is not imported for it
        places = [] if spec is None else list(spec.submodule_search_locations or [spec.origin or ""])
        yield from map(Path, places)
    yield request.data_root or store / DATASETS / request.dataset
    yield weights_folder()
    yield from (Path(value) for value in request.set.values() if isinstance(value, str) and value)


def _files(place: Path) -> Iterator[list[Any]]:
    """Name, size and time of each file in a folder, or of the file itself; nothing if there is none."""
    if place.is_file():
        status = place.stat()
        yield [str(place.absolute()), status.st_size, status.st_mtime_ns]
    elif place.is_dir():
        for folder, below, names in os.walk(place):
            below[:] = sorted(name for name in below if name != "__pycache__")
            for path in (os.path.join(folder, name) for name in sorted(names)):
                status = os.stat(path, follow_symlinks=True) if os.path.exists(path) else os.lstat(path)
                yield [os.path.abspath(path), status.st_size, status.st_mtime_ns]
