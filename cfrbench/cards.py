"""Method cards: what an SSL method is, from the class itself; one source for the command line and docs/methods.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from torch import nn

from cfrbench import registry
from cfrbench.config import Frozen
from cfrbench.contracts import SSLMethod

#: what the letters of formulas stand for
SYMBOLS = (
    "z logits and p = softmax(z) of the trained network, argmax z its labels; z', p' those of its teacher or snapshot. "
    "x crops; l and u pick the labelled and unlabelled ones; y true labels, 255 ignored. c one of C classes, the "
    "background among them. CE cross-entropy, Dice 1 minus the Dice of squares, mean over classes; e(p) entropy over "
    "ln C. mean runs over crops, classes and voxels; argmax and labels carry no gradient. t step of N; "
    "R(a, b) = exp(-5 (1 - a / b)^2) up to b, then 1; w(t) = consistency R(t / epoch_steps, ramp_length), epochs in "
    "whole numbers. F features, c_l and c'_u prototypes."
)


@dataclass(frozen=True)
class Option:
    """One field of a method's Config."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """What `cfrbench ssl show` prints."""

    name: str
    title: str
    summary: str
    reference: str
    networks: tuple[str, ...]
    size: str
    formulas: Mapping[str, str]
    options: tuple[Option, ...]
    configs: Mapping[str, Mapping[str, Any]]
    differences: tuple[str, ...]


def card(name: str) -> Card:
    """The card of the registered method ``name``; PluginError if there is none."""
    cls: type[SSLMethod] = registry.load("ssl", name)
    networks, size = _networks(cls)
    summary = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
    return Card(cls.name, cls.title, summary, cls.reference, networks, size, dict(cls.formulas), _options(cls.Config),
                dict(cls.configs), tuple(cls.differences))  # fmt: skip


def _networks(cls: type[SSLMethod]) -> tuple[tuple[str, ...], str]:
    """Name the networks that the default options build, and how many parameters train, on a small V-Net."""
    plugin = registry.load("net", "vnet")
    segmenter = plugin(plugin.Config(width=4))
    made: list[nn.Module] = []

    def make_net() -> nn.Module:
        made.append(segmenter.build(1, 2))
        return made[-1]

    method = cls(make_net, 2, cls.Config())
    names = {id(module): name for name, module in reversed(list(method.named_modules()))}
    words = [f"{names[id(net)]} ({_role(net)})" for net in made if id(net) in names]
    whole = sum(p.numel() for p in segmenter.build(1, 2).parameters())
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return tuple(words), f"{trained / whole:.2f}"


def _role(net: nn.Module) -> str:
    return "trains" if any(p.requires_grad for p in net.parameters()) else "no gradient"


def _options(config: type[Frozen]) -> tuple[Option, ...]:
    return tuple(
        Option(name, _plain(field.default), field.description or "", _choices(field.annotation))
        for name, field in config.model_fields.items()
    )


def _choices(annotation: Any) -> tuple[str, ...]:
    return tuple(str(choice) for choice in get_args(annotation)) if get_origin(annotation) is Literal else ()


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def markdown(found: Card) -> str:
    """The card as a section of a page."""
    count, networks = len(found.networks), ", ".join(f"`{name}`" for name in found.networks)
    parts = [
        f"## {found.title}: `{found.name}`",
        found.summary,
        f"Reference: {found.reference}",
        f"Networks: {count}: {networks}. It trains {found.size} times the parameters of one network.",
        _table(("loss", "formula"), [(f"`{name}`", f"`{text}`") for name, text in found.formulas.items()]),
        _table(("option", "default", "meaning"), [_row(option) for option in found.options]),
        *(_config(found.name, name, values) for name, values in found.configs.items()),
    ]
    if found.differences:
        parts.append("\n".join(["Where paper, code and cfrbench differ:", "", *(f"- {d}" for d in found.differences)]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(option: Option) -> tuple[str, str, str]:
    choices = ", ".join(f"`{choice}`" for choice in option.choices)
    words = "; ".join(part for part in (option.description, choices) if part)
    return f"`{option.name}`", f"`{option.default}`", words


def _config(method: str, name: str, values: Mapping[str, Any]) -> str:
    pairs = ", ".join(f"`{key}={_plain(value)}`" for key, value in values.items())
    return f"`ssl.{method}.config={name}` stands for {pairs}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(names: Sequence[str]) -> str:
    """The page docs/methods.md, which ``make methods`` writes."""
    head = [
        "# Methods",
        "One card a method, written by `cfrbench ssl show --all --markdown` from the classes themselves. Options are "
        "set by `--set ssl.NAME.OPTION=VALUE`; `ssl.NAME.config=original` stands for the values of the original where "
        "they change something inside the method. Steps, learning rate, batch and test are those of "
        "[the protocol](protocol.md) for all of them: last checkpoint, no selection on test cases.",
        f"Symbols: {SYMBOLS}",
        "The CFR twin of a method adds 0.5 (CE + Dice) of the guided logits on unlabelled crops against the "
        "foundation model's pseudo-labels; a method of two trained networks is guided in both.",
    ]
    return "\n\n".join(head) + "\n\n" + "\n".join(markdown(card(name)) for name in names)
