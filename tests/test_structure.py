"""The house keeps its shape, read from its sources: imports point one way, pieces stay small, light modules light."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "cfrbench").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
OTHERS = [file for top in ("tests", "benchmarks", "docs") for file in sorted((ROOT / top).rglob("*.py"))]
EVERYTHING = [*CORE, *PLUGINS, *OTHERS]

#: docs/architecture.md draws this house: a module imports from floors below its own, or from its own
FLOORS = [
    tuple(line.split())
    for line in """
    errors
    config volume files cells wording batch_norm heap
    formats machine weights checkpoint compute headroom
    losses schedules metrics canvas intensity jitter sampling inference windows images averaging sam_like \
    blocked_attention lean perturbations distance_maps uncertainty prototypes confident_learning scan_steps \
    adversarial memory_bank cubes pasting independence
    contracts values backbone
    hookspecs decoders promptable tuners prompting slices tiling pretrained med2d teachers guidance datasets gauges \
    layouts prepared folding
    registry
    prepare training
    tuning retraining testing
    pipeline
    artifact leases published
    store report
    results
    recipes matrix agenda following
    stages
    sweep ablation forecast sharing
    reporting comparing explanation diagnosis prediction evaluation cleaning montage parameters catalogue exhibition \
    cards archive pages standing \
    cancelling finished probes memory_budget
    exhibits
    cli
    """.strip().splitlines()
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

#: the paper's chain takes objects, not names or keys; a report needs neither data nor plug-ins
APART = {
    "pipeline": {"registry", "store", "artifact"},
    "store": {"registry", "pipeline"},
    "report": set(FLOOR) - {"report", "published", "errors"},
}
#: plug-ins build on contracts and mathematics, never on what runs them
CLOSED_TO_PLUGINS = {"cli", "sweep", "report"}
LIGHT = ("cfrbench", "cfrbench.cli", "cfrbench.registry", "cfrbench.config", "cfrbench.hookspecs", "cfrbench.errors")


@cache
def tree(path: Path) -> ast.Module:
    """The parsed source of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def label(path: Path) -> str:
    """The path as a test prints it."""
    return str(path.relative_to(ROOT))


def imports(path: Path) -> list[tuple[int, str, str]]:
    """Line, module and name of every import in a file, those inside functions too; name is "" for ``import x``."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno}: relative import; write the module's whole name"
            found += [(node.lineno, node.module or "", alias.name) for alias in node.names]
    return found


def module_of(path: Path) -> str:
    """The first name below ``cfrbench`` that a core file belongs to; "" for the package's own ``__init__``."""
    first = path.relative_to(ROOT / "cfrbench").parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def core_imports(path: Path) -> list[tuple[int, str]]:
    """Line and first name below ``cfrbench`` of what a file imports from the core."""
    wanted = []
    for line, module, name in imports(path):
        whole = f"{module}.{name}" if module == "cfrbench" and name else module
        head, _, rest = whole.partition(".")
        if head == "cfrbench" and rest and not rest.startswith("__"):
            wanted.append((line, rest.split(".")[0]))
    return wanted


def test_every_core_module_has_a_floor_and_every_floor_is_inhabited() -> None:
    present = {module_of(path) for path in CORE} - {""}
    assert present == set(FLOOR), "FLOORS and docs/architecture.md must name each module of cfrbench once"


def test_arrows_point_one_way() -> None:
    upward = [
        f"{label(path)}:{line} imports cfrbench.{name}"
        for path in CORE
        for line, name in core_imports(path)
        if module_of(path) in FLOOR and FLOOR.get(name, len(FLOORS)) > FLOOR[module_of(path)]
    ]
    assert not upward


def test_what_must_stay_apart_does() -> None:
    met = [
        f"{label(path)}:{line} imports cfrbench.{name}"
        for path in CORE
        for line, name in core_imports(path)
        if name in APART.get(module_of(path), set())
    ]
    assert not met


def test_no_modules_import_each_other_in_a_circle() -> None:
    needs: dict[str, set[str]] = {module_of(path): set() for path in CORE}
    for path in CORE:
        needs[module_of(path)] |= {name for _, name in core_imports(path)} - {module_of(path)}
    done: set[str] = set()
    while ready := {name for name in needs if name not in done and needs[name] <= done}:
        done |= ready
    assert done == set(needs), f"in a circle: {sorted(set(needs) - done)}"


def test_the_core_never_imports_a_plugin() -> None:
    packages = {folder.name for folder in (ROOT / "plugins").iterdir() if folder.is_dir()}
    guilty = [
        f"{label(path)}:{line} imports {module}"
        for path in CORE
        for line, module, _ in imports(path)
        if module.split(".")[0] in packages
    ]
    assert len(packages) > 5
    assert not guilty


def test_plugins_import_only_public_names_of_the_core() -> None:
    guilty = []
    for path in [*PLUGINS, *sorted((ROOT / "docs" / "examples").rglob("*.py"))]:
        for line, module, name in imports(path):
            parts = [*module.split("."), *([name] if name else [])]
            private = any(part.startswith("_") and not part.startswith("__") for part in parts)
            if parts[0] == "cfrbench" and (private or (parts[1:2] and parts[1] in CLOSED_TO_PLUGINS)):
                guilty.append(f"{label(path)}:{line} imports {'.'.join(parts)}")
    assert not guilty


def test_no_file_is_over_400_lines() -> None:
    assert not [label(path) for path in EVERYTHING if path.read_text(encoding="utf-8").count("\n") > 400]


def test_no_function_is_over_50_lines() -> None:
    long = [
        f"{label(path)}:{node.lineno} {node.name}: {lines} lines"
        for path in EVERYTHING
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > 50
    ]
    assert not long


def test_every_module_says_what_it_is() -> None:
    silent = [label(p) for p in EVERYTHING if tree(p).body and not ast.get_docstring(tree(p))]
    assert not silent


def test_library_code_never_prints() -> None:
    calls = [
        f"{label(path)}:{node.lineno}"
        for path in [*CORE, *PLUGINS]
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls, "observers and the command line show things"


def test_light_modules_import_neither_torch_nor_pandas() -> None:
    # Each alone, in one process started once: a module is forgotten before the next is tried.
    script = f"""
import importlib, sys
clean = set(sys.modules)
for name in {LIGHT!r}:
    importlib.import_module(name)
    print(name, sorted({{"torch", "pandas", "matplotlib", "peft"}} & set(sys.modules)))
    for module in set(sys.modules) - clean:
        if module.startswith("cfrbench"):
            del sys.modules[module]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} []" for name in LIGHT]
