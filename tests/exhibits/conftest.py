"""Recipes of guests, installed for one test module."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cfrbench import registry
from tests.guests import install

Guest = Callable[[str, str], Path]


def forget() -> None:
    """Make the registry look again."""
    registry.discover.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    """Install a recipe by name and text, as a distribution of its own whose module is empty; the file it lies in."""
    folder = tmp_path / "guests"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def add(name: str, text: str) -> Path:
        module = f"guest_{name.replace('-', '_')}"
        install(folder, f"dist-{name}", {f"recipe.{name}": (module, "raise RuntimeError('a recipe is data')\n")})
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
        forget()
        return folder / f"{name}.toml"

    yield add
    monkeypatch.undo()
    forget()
