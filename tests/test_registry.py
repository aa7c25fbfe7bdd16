"""The registry tells the truth: names without imports, conflicts shown, broken guests reported and harmless."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from cfrbench import registry
from cfrbench.errors import PluginError
from tests.guests import CLAIMS_MT, GOOD, METHOD, RAISES_ON_IMPORT, install

Install = Callable[[str, Mapping[str, tuple[str, str]]], None]


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install distributions for one test; afterwards neither their modules nor cached answers are left."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def forget() -> None:
        registry.discover.cache_clear()
        registry.load.cache_clear()
        importlib.invalidate_caches()

    def add(distribution: str, plugins: Mapping[str, tuple[str, str]]) -> None:
        install(tmp_path, distribution, plugins)
        forget()

    yield add
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    forget()


def state(name: str, kind: str = "ssl") -> list[registry.Listing]:
    """The rows of ``cfrbench plugins`` for one name."""
    return [item for item in registry.listing() if (item.plugin.kind, item.plugin.name) == (kind, name)]


def refusal(name: str, kind: str = "ssl") -> PluginError:
    """The error of asking for a name."""
    with pytest.raises(PluginError) as caught:
        registry.load(kind, name)
    return caught.value


# ---------------------------------------------------------------------------------------------------------------------
# names


def test_every_built_in_of_pyproject_is_listed() -> None:
    found = {f"{p.kind}.{p.name}" for p in registry.discover() if p.distribution == "cfrbench"}
    assert {"concat.grid", "ssl.mt", "net.vnet", "data.phantom", "tune.lora", "executor.local"} <= found
    assert all(entry.partition(".")[0] in registry.KINDS for entry in found)


def test_names_are_listed_without_importing_a_plugin(tmp_path: Path) -> None:
    install(tmp_path, "raises-on-import", RAISES_ON_IMPORT)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from cfrbench import registry\n"
        "assert {'mt', 'broken'} <= set(registry.names('ssl')), registry.names('ssl')\n"
        "heavy = {'torch', 'pandas', 'raises_on_import'} & set(sys.modules)\n"
        "plugins = [m for m in sys.modules if m.startswith('cfrbench_')]\n"
        "assert not heavy and not plugins, (heavy, plugins)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_is_listed_once_per_kind() -> None:
    names = registry.names("ssl")
    assert names == sorted(set(names))


def test_an_unknown_name_gets_the_nearest_and_all_known() -> None:
    error = refusal("acmtt")
    assert "Did you mean 'acmt'?" in str(error)
    assert "mt" in str(error)
    assert "cfrbench plugins" in str(error)


def test_a_known_name_of_another_distribution_is_unknown() -> None:
    assert "No SSL method called 'nobody:mt'" in str(refusal("nobody:mt"))


# ---------------------------------------------------------------------------------------------------------------------
# a guest that works


def test_a_guest_loads_by_both_spellings(guest: Install) -> None:
    guest("good-guest", GOOD)
    cls = registry.load("ssl", "good")
    assert cls.title == "Good"
    assert registry.load("ssl", "good-guest:good") is cls
    assert registry.version("ssl", "good") == "good-guest 1.0"
    assert [item.status for item in state("good")] == ["ok"]


# ---------------------------------------------------------------------------------------------------------------------
# conflicts


def test_a_conflict_shows_both_and_breaks_no_other_name(guest: Install) -> None:
    guest("claims-mt", CLAIMS_MT)
    both = state("mt")
    assert [item.status for item in both] == ["conflict", "conflict"]
    assert {item.plugin.distribution for item in both} == {"cfrbench", "claims-mt"}
    for item, other in zip(both, reversed(both), strict=True):
        assert other.plugin.qualified in item.detail
    assert registry.load("ssl", "acmt").name == "acmt"


def test_asking_for_a_conflict_stops_and_names_both_distributions(guest: Install) -> None:
    guest("claims-mt", CLAIMS_MT)
    message = str(refusal("mt"))
    assert "'cfrbench:mt'" in message
    assert "'claims-mt:mt'" in message


def test_the_longer_name_chooses(guest: Install) -> None:
    guest("claims-mt", CLAIMS_MT)
    assert registry.load("ssl", "claims-mt:mt").title == "Another MT"
    assert registry.load("ssl", "cfrbench:mt").title == "MT"
    assert registry.version("ssl", "claims-mt:mt") == "claims-mt 1.0"


def test_one_name_in_two_kinds_is_no_conflict(guest: Install) -> None:
    guest("other-kind", {"ssl.grid": ("ssl_grid", METHOD.format(name="grid", title="Grid"))})
    assert [item.status for item in state("grid")] == ["ok"]
    assert [item.status for item in state("grid", "concat")] == ["ok"]


# ---------------------------------------------------------------------------------------------------------------------
# broken guests


def test_a_guest_that_raises_on_import_is_reported_with_its_cause(guest: Install) -> None:
    guest("raises-on-import", RAISES_ON_IMPORT)
    guest("good-guest", GOOD)
    (item,) = state("broken")
    assert item.status == "broken"
    assert "RuntimeError: no such GPU" in item.detail
    error = refusal("broken")
    assert isinstance(error.__cause__, RuntimeError)
    assert "raises-on-import" in str(error)
    assert [other.status for other in state("good")] == ["ok"]


def method(name: str = "odd", **changes: str) -> str:
    """The source of a working method with pieces replaced."""
    source = METHOD.format(name=name, title="Odd")
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    return source


BROKEN = {
    "leaves the process": ("raise SystemExit(3)\n", "SystemExit"),
    "is no Python": ("def :\n", "SyntaxError"),
    "misspells the hook": (method().replace("ssl_methods", "ssl_method"), "hook that does not exist"),
    "wants another argument": (method().replace("ssl_methods()", "ssl_methods(wishes)"), "takes other arguments"),
    "hook raises": (method().replace("return [Method]", "raise ValueError('oh')"), "ValueError: oh"),
    "returns a class, not a list": (method().replace("[Method]", "Method"), "must return a list of classes"),
    "forgets to return": (method().replace("return [Method]", "pass"), "offers nothing"),
    "promises another name": (method(name="even"), "name = 'odd'"),
    "offers two of a name": (method().replace("[Method]", "[Method, Method]"), "exactly one class"),
    "is no subclass": (method().replace("(SSLMethod)", ""), "not a subclass of cfrbench.contracts.SSLMethod"),
    "is an instance": (method().replace("(SSLMethod)", "").replace("[Method]", "[Method()]"), "not a subclass"),
    "lacks a method": (method().replace("def predictor", "def predict"), "lacks predictor"),
    "has a Config that can change": (
        method().replace("    def step", "    class Config(Frozen, frozen=False):\n        pass\n\n    def step"),
        "not frozen",
    ),
    "has a Config of its own kind": (
        method().replace("    def step", "    class Config:\n        pass\n\n    def step"),
        "not frozen",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_each_fault_is_one_clear_paragraph_and_harms_nobody(guest: Install, how: str) -> None:
    source, words = BROKEN[how]
    guest("odd-guest", {"ssl.odd": ("odd_guest", source)})
    message = str(refusal("odd"))
    assert words in message
    assert "odd-guest" in message
    (item,) = state("odd")
    assert item.status == "broken"
    assert item.detail == message
    assert [other.status for other in state("mt")] == ["ok"]


def test_an_unknown_kind_is_shown_as_such(guest: Install) -> None:
    guest("odd-guest", {"sll.odd": ("odd_guest", method())})
    (item,) = state("odd", "sll")
    assert item.status == "broken"
    assert "unknown kind 'sll'" in item.detail


def test_damaged_metadata_hides_nobody(guest: Install, tmp_path: Path) -> None:
    guest("good-guest", GOOD)
    (tmp_path / "good_guest-1.0.dist-info" / "METADATA").write_text("", encoding="utf-8")
    registry.discover.cache_clear()
    assert "mt" in registry.names("ssl")
    assert [item.plugin.distribution for item in state("good")] == ["?"]


OBSERVER = "from cfrbench.hookspecs import hookimpl\n\n\n@hookimpl\ndef {name}(task, step, values):\n    pass\n"


def test_observers_are_checked_for_their_hook_names(guest: Install) -> None:
    guest("watchers", {"observer.eyes": ("eyes", OBSERVER.format(name="step_done")),
                       "observer.blind": ("blind", OBSERVER.format(name="step_is_done"))})  # fmt: skip
    assert registry.load_observer("eyes").__name__ == "eyes"
    with pytest.raises(PluginError, match="hook that does not exist"):
        registry.load_observer("blind")
    assert [item.status for name in ("eyes", "blind") for item in state(name, "observer")] == ["ok", "broken"]


@pytest.mark.parametrize("plugin", registry.discover(), ids=lambda p: f"{p.kind}.{p.name}")
def test_every_built_in_loads_and_keeps_its_contract(plugin: registry.Plugin) -> None:
    if plugin.kind == "observer":
        assert registry.load_observer(plugin.name)
    elif plugin.kind == "recipe":
        assert registry.load_recipe(plugin.name)[1]["title"]
    else:
        assert registry.load(plugin.kind, plugin.name).name == plugin.name
