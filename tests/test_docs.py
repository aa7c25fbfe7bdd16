"""The documentation says what the code does: hooks, settings, commands, links, examples."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cfrbench import hookspecs, registry
from cfrbench.cli import app
from cfrbench.config import PRESETS, Settings, known_keys, override, parse_value

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / f for f in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
         ROOT / "plugins" / "README.md"]  # fmt: skip


def text(*path: str) -> str:
    """A page under docs."""
    return DOCS.joinpath(*path).read_text(encoding="utf-8")


def hooks() -> dict[str, list[str]]:
    """Every hook of hookspecs with its arguments."""
    marked = {n: f for n, f in vars(hookspecs).items() if callable(f) and hasattr(f, f"{hookspecs.PROJECT}_spec")}
    return {name: list(inspect.signature(function).parameters) for name, function in marked.items()}


def test_every_hook_is_documented_with_its_arguments() -> None:
    page = text("hooks.md")
    found = hooks()
    assert len(found) >= len(registry.KINDS)
    missing = [name for name, args in found.items() if f"`{name}({', '.join(args)})`" not in page]
    assert not missing


def test_no_hook_is_documented_that_does_not_exist() -> None:
    named = set(re.findall(r"^\| (?:`\w+` \| )?`(\w+)\(", text("hooks.md"), flags=re.MULTILINE))
    assert named == set(hooks())


def test_every_kind_is_in_the_table_of_kinds() -> None:
    for kind, (hook, contract, _) in registry.KINDS.items():
        if hook:
            assert f"| `{kind}` | `{hook}()` | `{contract}` |" in text("hooks.md")


def shown(value: Any) -> str:
    """A default as docs/protocol.md writes it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def test_the_protocol_page_states_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+\.\w+)` \| `([^`]+)` \|", text("protocol.md"), flags=re.MULTILINE))
    defaults = Settings()
    expected = {key: shown(getattr(getattr(defaults, key.split(".")[0]), key.split(".")[1])) for key in known_keys()}
    assert rows == expected


def test_the_protocol_page_names_what_the_paper_preset_changes() -> None:
    page = text("protocol.md")
    for key, value in PRESETS["paper"].items():
        assert key == "model" or (key in page and f"`{value}`" in page)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_named_in_commands_exist(page: Path) -> None:
    for key, value in re.findall(r"--set ([\w.-]+)=(\S+?)[`\s]", page.read_text(encoding="utf-8")):
        kind, _, rest = key.partition(".")
        if key.isupper():
            continue  # a placeholder
        if kind not in registry.KINDS:
            override(Settings(), {key: parse_value(value)})
        elif (name := rest.rpartition(".")[0]) in registry.names(kind):
            assert rest.rpartition(".")[2] in registry.load(kind, name).Config.model_fields, key
        else:
            assert name in ("NAME", "toy"), key


def commands() -> dict[str, set[str]]:
    """Every command of the command line with the options it takes."""
    for path in (ROOT / "cfrbench" / "cli").glob("*.py"):
        importlib.import_module(f"cfrbench.cli.{path.stem}")  # commands register themselves
    root = typer.main.get_command(app)
    found: dict[str, set[str]] = {}

    def visit(command: Any, name: str) -> None:
        found[name] = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for child, inner in getattr(command, "commands", {}).items():
            visit(inner, f"{name} {child}".strip())

    visit(root, "")
    return found


def examples(page: Path) -> list[str]:
    """Command lines in a page, from code blocks and from inline code."""
    source = page.read_text(encoding="utf-8")
    return re.findall(r"^    cfrbench (.+?)(?:\s+#.*)?$", source, flags=re.MULTILINE) + re.findall(
        r"`cfrbench ([^`]+)`", source
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_options_named_in_pages_exist(page: Path) -> None:
    known = commands()
    for line in examples(page):
        words = line.split()
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        if name.startswith("--"):
            name = ""
        assert name in known, f"{page.name}: cfrbench {line}"
        options = {word.split("=")[0] for word in words if word.startswith("-")}
        assert options <= known[name], f"{page.name}: cfrbench {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        linked = (page.parent / target) if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if "examples" not in p.parts}
    assert {page for page in pages if page not in navigation} == set()


def test_the_guide_shows_the_guest_as_it_is() -> None:
    guest = text("examples", "cfrbench-toy-ssl", "cfrbench_toy_ssl.py")
    shown_class = re.search(r"```python\n(class Toy.+?)```", text("write-a-plug-in.md"), flags=re.DOTALL)
    assert shown_class
    assert shown_class.group(1).strip() in guest


SMALL = 'preset="smoke", set={"data.phantom.train": 4, "data.phantom.test": 1, "data.phantom.shape": (32, 32, 16)}'


def test_the_python_of_the_first_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, pipeline = re.findall(r"```python\n(.+?)```", text("start.md"), flags=re.DOTALL)
    assert 'preset="smoke")' in command
    monkeypatch.chdir(tmp_path)  # its store is a folder beside it
    with contextlib.redirect_stdout(io.StringIO()) as table:
        exec(command.replace('preset="smoke"', SMALL), {})
    assert "MT" in table.getvalue()
    assert "cfr" in table.getvalue()
    with contextlib.redirect_stdout(io.StringIO()) as rows:
        exec(pipeline, {})
    assert "'case': 'test-00'" in rows.getvalue()


def test_the_floors_of_the_architecture_page_are_those_the_structure_test_holds() -> None:
    from tests.test_structure import FLOORS

    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", text("architecture.md"), flags=re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == FLOORS


def test_make_check_and_pages_name_the_same_chores() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)`", page.read_text(encoding="utf-8"))) <= targets
