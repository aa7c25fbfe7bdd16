"""Finds, lists, checks and loads plug-ins; the only file that knows pluggy and entry points.

Laws: names come from metadata alone, nothing is imported before it is asked for; two plug-ins of one name are both
shown and neither is chosen silently (``DIST:name`` chooses); a broken plug-in breaks only itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from cfrbench import hookspecs
from cfrbench.config import Frozen
from cfrbench.errors import PluginError, suggest

GROUP = "cfrbench"

#: kind -> (hook that returns its classes, contract class, words for a person)
KINDS: dict[str, tuple[str, str, str]] = {
    "concat": ("concat_strategies", "ConcatStrategy", "concatenation strategy"),
    "model": ("foundation_models", "FoundationModel", "foundation model"),
    "tune": ("fine_tuners", "FineTuner", "fine-tuner"),
    "ssl": ("ssl_methods", "SSLMethod", "SSL method"),
    "net": ("segmenters", "Segmenter", "segmenter"),
    "data": ("data_sources", "DataSource", "data set"),
    "executor": ("executors", "Executor", "executor"),
    "observer": ("", "", "observer"),
    "recipe": ("", "", "recipe"),
}


@dataclass(frozen=True)
class Plugin:
    """One entry point: what its metadata says, before anything is imported."""

    kind: str
    name: str
    distribution: str
    version: str
    module: str

    @property
    def qualified(self) -> str:
        """``DIST:name``, which chooses between two plug-ins of one name."""
        return f"{self.distribution}:{self.name}"


@dataclass(frozen=True)
class Listing:
    """A plug-in as ``cfrbench plugins`` shows it: found, in conflict, or broken with its cause."""

    plugin: Plugin
    status: str
    detail: str = ""


@cache
def discover() -> tuple[Plugin, ...]:
    """All entry points of the group, sorted by kind and name; imports none of them."""
    from importlib import metadata

    found = set()
    for entry in metadata.entry_points(group=GROUP):
        kind, _, name = entry.name.partition(".")
        # A damaged installation has no name or version in its metadata; it must not keep the others from being listed.
        said: Any = entry.dist.metadata if entry.dist else {}
        found.add(Plugin(kind, name, said.get("Name", "?"), said.get("Version", "?"), entry.module))
    return tuple(sorted(found, key=lambda p: (p.kind, p.name, p.distribution)))


def names(kind: str) -> list[str]:
    """Sorted names of one kind, each once."""
    return sorted({p.name for p in discover() if p.kind == kind})


def find(kind: str, name: str) -> Plugin:
    """The entry point called ``name`` or ``DIST:name``; raises PluginError if unknown or ambiguous."""
    dist, _, short = name.rpartition(":")
    hits = [p for p in discover() if p.kind == kind and p.name == short and dist in ("", p.distribution)]
    words = KINDS[kind][2]
    if not hits:
        raise PluginError(
            f"No {words} called '{name}'. {suggest(short, names(kind))} "
            "Run `cfrbench plugins` to see where each comes from."
        )
    if len(hits) > 1:
        sides = " and ".join(f"'{p.qualified}' ({p.module})" for p in hits)
        raise PluginError(f"Two plug-ins claim the {words} '{short}': {sides}. Ask for one by that longer name.")
    return hits[0]


@cache
def load(kind: str, name: str) -> type[Any]:
    """Import and check the class called ``name``; raises PluginError with the cause chained."""
    plugin = find(kind, name)
    module = _import(plugin)
    hook, contract, words = KINDS[kind]
    classes = _offered(plugin, _manager(plugin, module), hook)
    matches = [cls for cls in classes if getattr(cls, "name", None) == plugin.name]
    if len(matches) != 1:
        offered = ", ".join(str(getattr(c, "name", c)) for c in classes) or "nothing"
        raise PluginError(
            f"The {words} '{plugin.name}' of {plugin.distribution} ({plugin.module}) offers {offered} through the hook "
            f"'{hook}', but its entry point promises exactly one class with name = '{plugin.name}'. "
            "Correct the entry point or the class's `name`."
        )
    chosen: type[Any] = matches[0]
    _check_contract(plugin, chosen, contract)
    return chosen


def load_observer(name: str) -> ModuleType:
    """Import an observer module (hooks of the second half of hookspecs) and check its hook names."""
    plugin = find("observer", name)
    module = _import(plugin)
    _manager(plugin, module)
    return module


def load_recipe(name: str) -> tuple[Path, dict[str, Any]]:
    """Where a recipe (`cfrbench.exhibits`) lies and what its TOML says; PluginError with the reason if it is broken.

    It is ``NAME.toml`` in the package, or beside the module, of its entry point. A recipe is data: nothing of its
    distribution is run, except that finding a module inside a package imports the package.
    """
    import tomllib

    plugin = find("recipe", name)
    path = _folder(plugin) / f"{plugin.name}.toml"
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PluginError(f"The recipe '{plugin.name}' of {plugin.distribution} cannot be read from {path}: {error}. "
                          f"Repair or uninstall {plugin.distribution}.") from error  # fmt: skip


def _folder(plugin: Plugin) -> Path:
    """The folder of a package, or the one that a module lies in."""
    import importlib.util

    try:
        spec = importlib.util.find_spec(plugin.module)
    except (Exception, SystemExit) as error:  # a parent package is a guest like any other
        raise _broken_import(plugin, error) from error
    if spec is None:
        raise _broken_import(plugin, ModuleNotFoundError(f"no module named '{plugin.module}'"))
    places = list(spec.submodule_search_locations or [])
    return Path(places[0]) if places else Path(str(spec.origin)).parent


def observers() -> pluggy.PluginManager:
    """A manager on which observers are registered; calling its hooks reaches them all."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


#: observers of this process: the command line registers its progress display here
WATCHERS = observers()


@contextmanager
def watching(names: Iterable[str]) -> Iterator[None]:
    """Within the block the observers called ``names`` hear what happens in this process."""
    modules = [module for module in map(load_observer, names) if not WATCHERS.is_registered(module)]
    for module in modules:
        WATCHERS.register(module)
    try:
        yield
    finally:
        for module in modules:
            WATCHERS.unregister(module)


def version(kind: str, name: str) -> str:
    """``DISTRIBUTION VERSION`` of a plug-in, part of every stage key it takes part in."""
    plugin = find(kind, name)
    return f"{plugin.distribution} {plugin.version}"


def listing(*, check: bool = False) -> list[Listing]:
    """Every plug-in with its state; ``check`` imports each one to find the broken."""
    return [_state(plugin, check) for plugin in discover()]


def _state(plugin: Plugin, check: bool) -> Listing:
    if plugin.kind not in KINDS:
        return Listing(plugin, "broken", f"unknown kind '{plugin.kind}'; kinds are {', '.join(KINDS)}")
    rivals = _rivals(plugin, discover())
    if rivals:
        return Listing(plugin, "conflict", f"also claimed by {', '.join(rivals)}; ask for '{plugin.qualified}'")
    # Built-ins are tested as a whole; only guests are imported for a plain listing, so that it answers at once.
    if not check and plugin.distribution == "cfrbench":
        return Listing(plugin, "ok")
    loaders = {"observer": load_observer, "recipe": load_recipe}
    try:
        loaders[plugin.kind](plugin.name) if plugin.kind in loaders else load(plugin.kind, plugin.name)
    except PluginError as error:
        return Listing(plugin, "broken", str(error))
    return Listing(plugin, "ok")


def _rivals(plugin: Plugin, everyone: Iterable[Plugin]) -> list[str]:
    return [p.qualified for p in everyone if (p.kind, p.name) == (plugin.kind, plugin.name) and p != plugin]


def _import(plugin: Plugin) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(plugin.module)
    except (Exception, SystemExit) as error:  # whatever a guest raises on import must be reported, not spread
        raise _broken_import(plugin, error) from error


def _broken_import(plugin: Plugin, error: BaseException) -> PluginError:
    return PluginError(
        f"The plug-in '{plugin.kind}.{plugin.name}' of {plugin.distribution} {plugin.version} cannot be imported "
        f"({plugin.module}: {type(error).__name__}: {error}). Repair or uninstall {plugin.distribution}."
    )


def _manager(plugin: Plugin, module: ModuleType) -> pluggy.PluginManager:
    manager = observers()
    try:
        manager.register(module)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(
            f"The plug-in '{plugin.kind}.{plugin.name}' of {plugin.distribution} implements a hook that does not exist "
            f"or takes other arguments: {error}. See cfrbench/hookspecs.py for the hooks."
        ) from error
    return manager


def _offered(plugin: Plugin, manager: pluggy.PluginManager, hook: str) -> list[Any]:
    """What the module returns from the hook of its kind; a guest's mistakes in it are its own."""
    try:
        return [cls for answer in getattr(manager.hook, hook)() for cls in answer]
    except Exception as error:
        raise PluginError(
            f"The hook '{hook}' of the plug-in '{plugin.kind}.{plugin.name}' of {plugin.distribution} "
            f"({plugin.module}) fails: {type(error).__name__}: {error}. It must return a list of classes. "
            f"Repair or uninstall {plugin.distribution}."
        ) from error


def _check_contract(plugin: Plugin, cls: type[Any], contract: str) -> None:
    from cfrbench import contracts  # imports torch, which listing names must not

    base = getattr(contracts, contract)
    where = f"'{plugin.kind}.{plugin.name}' of {plugin.distribution} ({plugin.module})"
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"{where} is not a subclass of cfrbench.contracts.{contract}. Derive it from that class.")
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"{where} lacks {', '.join(missing)}. Implement what the contract {contract} asks for.")
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, Frozen) and config.model_config.get("frozen")):
        raise PluginError(f"{where} has a Config that is not frozen. Derive it from cfrbench.config.Frozen.")
