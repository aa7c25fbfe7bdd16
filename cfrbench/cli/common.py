"""Options and parsers that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cfrbench.config import parse_value
from cfrbench.errors import ConfigError

DEFAULT_STORE = Path("cfrbench-store")
StoreOption = Annotated[Path, typer.Option(help="Folder of finished stages.", envvar="CFRBENCH_STORE")]
FoldOption = Annotated[str | None, typer.Option(help="Which fold, e.g. 2/5.")]
ChoiceOption = Annotated[str | None, typer.Option("--label-seed", help="Which choice of labelled cases.")]
ExecutorOption = Annotated[
    str, typer.Option(help="Where stages run: local, ray, slurm; its options: --set executor.NAME.OPTION=VALUE.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """``"mt, acmt"`` -> ``("mt", "acmt")``, each once; None stays None."""
    if text is None:
        return None
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ConfigError(f"'{text}' names nothing. Give names separated by commas.")
    return found


def parse_labels(text: str | None) -> tuple[int | str, ...] | None:
    """``"1,4,moderate"`` -> ``(1, 4, "moderate")``."""
    names = parse_names(text)
    return None if names is None else tuple(int(n) if n.lstrip("-").isdigit() else n for n in names)


def parse_sizes(option: str, text: str | None) -> tuple[int, ...] | None:
    """``"1,2,4"`` -> ``(1, 2, 4)``; ConfigError that names ``option`` if one is no whole number above 0."""
    names = parse_names(text)
    if names is None:
        return None
    if not all(n.isdigit() and int(n) for n in names):
        raise ConfigError(f"{option} {text} holds something that is not a whole number above 0. Write e.g. 1,2,4.")
    return tuple(int(n) for n in names)


def parse_seeds(count: int | None, listed: str | None) -> tuple[int, ...] | None:
    """Seeds 0 .. count-1, or those listed; ConfigError if both or neither make sense."""
    if count is not None and listed is not None:
        raise ConfigError("--seeds N and --seed-list contradict each other. Give one of them.")
    if count is not None:
        if count < 1:
            raise ConfigError(f"--seeds {count} asks for no seed. Give at least 1.")
        return tuple(range(count))
    names = parse_names(listed)
    if names is None:
        return None
    if not all(n.isdigit() for n in names):
        raise ConfigError(f"--seed-list {listed} holds something that is not a whole number. Write e.g. 0,1,7.")
    return tuple(int(n) for n in names)


def parse_set(pairs: list[str] | None) -> dict[str, Any]:
    """``["training.steps=900"]`` -> ``{"training.steps": 900}``."""
    values: dict[str, Any] = {}
    for pair in pairs or []:
        key, sign, text = pair.partition("=")
        if not sign:
            raise ConfigError(f"--set {pair} has no '='. Write KEY=VALUE, for example training.steps=1800.")
        values[key.strip()] = parse_value(text.strip())
    return values


def parse_replacements(values: list[str] | None) -> dict[str, str]:
    """``["phantom", "btcv=organs"]`` -> ``{"": "phantom", "btcv": "organs"}``; "" stands for whatever is not named."""
    found: dict[str, str] = {}
    for value in values or []:
        old, sign, new = value.partition("=")
        key, chosen = (old, new) if sign else ("", old)
        if not chosen:
            raise ConfigError(f"'{value}' names nothing. Write NAME, or OLD=NEW.")
        if found.setdefault(key, chosen) != chosen:
            raise ConfigError(f"'{value}' and '{found[key]}' contradict each other. Give one of them.")
    return found
