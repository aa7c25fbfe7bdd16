"""How many parameters fine-tuners have and train, counted on models of shapes alone, which hold no numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cfrbench import registry
from cfrbench.compute import single_thread
from cfrbench.config import validate
from cfrbench.contracts import FineTuner, FoundationModel, Promptable, Published
from cfrbench.errors import UsageError

#: parameter -> whether a gradient of the logits reaches it
Reached = Mapping[str, bool]


@dataclass(frozen=True)
class Count:
    """One row: parameters in all, those flagged trainable, and those that the gradient of the logits reaches.

    ``reason`` says why a fine-tuner does not fit the model; then the numbers are 0.
    """

    tuner: str
    title: str
    input_size: int
    num_classes: int  # masks of the decoder, background included
    total: int = 0
    flagged: int = 0
    effective: int = 0
    reason: str = ""


class Unfilled(TorchFunctionMode):
    """Within it `torch.nn.init` leaves tensors as they are, which halves the time to build a model of shapes alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, unless it would fill the tensor that is its first argument."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def count_tuners(
    model_name: str, tuner_names: Sequence[str], input_size: int | None = None, num_classes: int | None = None
) -> list[Count]:
    """Count the fine-tuners called ``tuner_names`` (all of them if empty) on the model called ``model_name``.

    On SAM's ViT each in its published configurations; on others, or with an input size or a number of classes, in its
    default options.
    UsageError for a model whose shapes cannot be built without its weights.
    """
    model = registry.load("model", model_name)
    size = input_size or validate(model.Config, {}, f"the options of model.{model_name}").input_size
    published = model.encoder == "vit" and not (input_size or num_classes)
    default = Published("default options", input_size=size, num_classes=num_classes or 2)
    counts = []
    for name in tuner_names or registry.names("tune"):
        tuner = registry.load("tune", name)
        rows = (tuner.published if published else ()) or (default,)
        widest = {repr(row.options): row for row in sorted(rows, key=lambda row: row.num_classes)}
        twins = {options: _twin(model, tuner, row) for options, row in widest.items()}
        counts += [count_tuner(model, tuner, row, twins[repr(row.options)]) for row in rows]
    return counts


def count_model(model: FoundationModel, num_classes: int) -> int:
    """Parameters of a foundation model with ``num_classes`` masks."""
    with torch.device("meta"), Unfilled():
        return sum(p.numel() for p in model.architecture(num_classes).parameters())


def count_tuner(
    model_cls: type[FoundationModel], tuner_cls: type[FineTuner], row: Published, twin: Reached | None = None
) -> Count:
    """Count one configuration; ``twin`` says what a gradient reaches in a smaller model of the same names."""
    twin = _twin(model_cls, tuner_cls, row) if twin is None else twin
    tuner, model = _pair(tuner_cls, model_cls, row)
    about: Any = {"tuner": tuner_cls.name, "title": row.title, "input_size": row.input_size,
                  "num_classes": row.num_classes}  # fmt: skip
    if reason := tuner.refuses(model):
        return Count(**about, reason=reason)
    with torch.device("meta"), Unfilled():
        adapted = _adapted(tuner, model, row.num_classes)
        parameters = dict(adapted.named_parameters())
        reached = twin if parameters.keys() <= twin.keys() else _reached(tuner, adapted, row.input_size)
    return Count(
        **about,
        total=sum(p.numel() for p in parameters.values()),
        flagged=sum(p.numel() for p in parameters.values() if p.requires_grad),
        effective=sum(p.numel() for name, p in parameters.items() if reached[name]),
    )


def _twin(model_cls: type[FoundationModel], tuner_cls: type[FineTuner], row: Published) -> Reached:
    """`_reached` of a model with the same names, few channels and few pixels, if there is one.

    A backward pass of shapes alone takes several times as long as one of numbers in a small network.
    """
    tuner, model = _pair(tuner_cls, model_cls, row)
    narrow = model.narrowed()
    if narrow is None or tuner.refuses(model):
        return {}
    with torch.random.fork_rng(devices=[]), single_thread():
        return _reached(tuner, _adapted(tuner, narrow, row.num_classes), narrow.input_size)


def _reached(tuner: FineTuner, adapted: Promptable, input_size: int) -> Reached:
    if tuner.trains:
        adapted.train()(tuner.example(input_size)).sum().backward()
    return {name: parameter.grad is not None for name, parameter in adapted.named_parameters()}


def _pair(
    tuner_cls: type[FineTuner], model_cls: type[FoundationModel], row: Published
) -> tuple[FineTuner, FoundationModel]:
    bare = _bare(model_cls)
    sized = validate(model_cls.Config, {"input_size": row.input_size}, f"the options of model.{model_cls.name}")
    options = validate(tuner_cls.Config, row.options, f"the options of tune.{tuner_cls.name}")
    return tuner_cls(options), bare(sized)


def _adapted(tuner: FineTuner, model: FoundationModel, num_classes: int) -> Promptable:
    adapted = tuner.build(model, num_classes)
    tuner.adapt(adapted)
    return adapted


def _bare(model_cls: type[FoundationModel]) -> type[FoundationModel]:
    """The same model, built without its weights."""

    def build(self: FoundationModel, num_classes: int) -> Promptable:
        return self.architecture(num_classes)

    if model_cls.architecture is FoundationModel.architecture:
        raise UsageError(f"The parameters of '{model_cls.name}' cannot be counted: its plug-in has no `architecture`, "
                         "which builds it without weights. Choose another with --model.")  # fmt: skip
    return type(model_cls.__name__, (model_cls,), {"build": build})
