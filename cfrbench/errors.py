"""Everything cfrbench raises on purpose.

    CfrbenchError            exit code 1
    ├── UsageError           exit code 2: the request cannot be carried out as written
    │   ├── ConfigError      a setting is unknown, of the wrong type or contradicts another
    │   └── PluginError      a plug-in is unknown, in conflict, broken or does not fit its partner
    ├── DataError            exit code 2: a file or a data set is not what it should be
    ├── WeightsError         exit code 2: a checkpoint is missing, damaged or of another model
    ├── StoreError           exit code 1: the store cannot be read, written or trusted
    ├── OutOfMemory          a stage needs more memory than there is; where that helps, it was tried again
    ├── Skipped              a stage was not begun, because one it needs has failed
    └── Interrupted          exit code 130: a signal asked to stop; the state is saved

Each message is one paragraph: which file or name, what is wrong, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CfrbenchError(Exception):
    """Base of all errors with a remedy in their message."""

    exit_code = 1


class UsageError(CfrbenchError):
    """The request cannot be carried out as it is written."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class PluginError(UsageError):
    """A plug-in is unknown, in conflict, broken, or does not fit the others."""


class DataError(CfrbenchError):
    """A file or a data set is not what it should be."""

    exit_code = 2


class WeightsError(CfrbenchError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 2


class StoreError(CfrbenchError):
    """The store cannot be read, written, or trusted."""


class OutOfMemory(CfrbenchError):
    """A stage needs more memory, of the machine or of its GPU, than there is."""


class Skipped(CfrbenchError):
    """A stage was not begun, because one it needs has failed."""


class Interrupted(CfrbenchError):
    """A signal asked to stop; the state was saved, the same command goes on."""

    exit_code = 130


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"Did you mean 'x'? Known: ..."`` for an unknown name."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Known: {', '.join(names) or 'none'}."
