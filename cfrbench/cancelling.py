"""Stopping a run from anywhere: a file that its workers look for, and its executor's queue where that is at hand."""

from __future__ import annotations

from collections.abc import Iterator

from cfrbench import registry
from cfrbench.config import validate
from cfrbench.errors import PluginError
from cfrbench.files import write_atomic
from cfrbench.standing import standing
from cfrbench.store import Store


def cancel(home: Store, reference: str) -> Iterator[str]:
    """Ask everybody who works for the run to save and stop; yields what was done, in sentences."""
    record = home.run(reference)
    name = record["name"]
    found = standing(home, record)
    open_cells = [cell for cell, state in zip(record["cells"], found.cells, strict=True) if state.state != "done"]
    if not open_cells:
        yield f"{name}: every cell is done, there is nothing to stop."
        return
    write_atomic(home.cancel_mark(name), b"")
    yield (f"{name}: {found.count('running')} running and {found.count('waiting')} waiting cells are asked to stop; "
           "stages that run save their state within seconds. Give the run's command again to go on.")  # fmt: skip
    asked = record.get("executor", {})
    try:
        cls = registry.load("executor", asked["name"])
        runner = cls(validate(cls.Config, asked["options"], f"the options of executor.{cls.name}"), home.root)
    except (KeyError, PluginError) as error:  # an older record, or a machine without the cluster's commands
        if isinstance(error, PluginError):
            yield f"Its queue cannot be reached from here: {error}"
        return
    said = runner.cancel({key for cell in open_cells for key in cell["keys"]})
    if said:
        yield f"{said}."
