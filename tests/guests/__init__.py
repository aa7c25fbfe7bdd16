"""Third-party distributions made on the spot: a module and the metadata an installer would have written.

`install` needs no pip: whatever stands on ``sys.path`` with a ``.dist-info`` folder is installed as far as entry points
are concerned. The broken guests every table of plug-ins must survive are here by name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from cfrbench import registry

#: a guest whose module cannot be imported
RAISES_ON_IMPORT = {"ssl.broken": ("raises_on_import", "raise RuntimeError('no such GPU')\n")}

METHOD = """
from cfrbench.config import Frozen
from cfrbench.contracts import SSLMethod
from cfrbench.hookspecs import hookimpl


class Method(SSLMethod):
    name = "{name}"
    title = "{title}"
    reference = "made in a test"

    def step(self, batch, progress):
        raise RuntimeError("never called")

    def predictor(self):
        raise RuntimeError("never called")


@hookimpl
def ssl_methods():
    return [Method]
"""

#: a guest that works, except that it calls itself like a built-in
CLAIMS_MT = {"ssl.mt": ("claims_mt", METHOD.format(name="mt", title="Another MT"))}
GOOD = {"ssl.good": ("good_guest", METHOD.format(name="good", title="Good"))}


def install(folder: Path, distribution: str, plugins: Mapping[str, tuple[str, str]], version: str = "1.0") -> None:
    """Lay a distribution into ``folder``: entry point -> (module name, its source)."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    lines = [f"{entry} = {module}" for entry, (module, _) in plugins.items()]
    (info / "entry_points.txt").write_text("\n".join(["[cfrbench]", *lines, ""]), encoding="utf-8")
    for module, source in plugins.values():
        (folder / f"{module}.py").write_text(dedent(source), encoding="utf-8")


def load_example(project: Path, kind: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A plug-in class of the package in ``project``, through the entry points of its own pyproject."""
    about = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = about["entry-points"]["cfrbench"]
    sources = {entry: (module, (project / f"{module}.py").read_text("utf-8")) for entry, module in entries.items()}
    install(folder, about["name"], sources, about["version"])
    monkeypatch.syspath_prepend(folder)
    registry.discover.cache_clear()
    loaded = registry.load(kind, name)
    # Later tests must not see a guest whose folder is gone.
    registry.discover.cache_clear()
    registry.load.cache_clear()
    return loaded
