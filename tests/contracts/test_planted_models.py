"""Faults planted in foundation models and fine-tuners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.contracts import Promptable
from cfrbench.testing import check_model, check_tuner

Lora: Any = registry.load("tune", "lora")
TinySam: Any = registry.load("model", "tiny")


class RandomTwice(TinySam):
    """Seeds itself from somewhere else."""

    builds = 0

    def build(self, num_classes: int) -> Promptable:
        RandomTwice.builds += 1
        torch.manual_seed(RandomTwice.builds)
        return super().build(num_classes)  # type: ignore[no-any-return]


class OneMaskTooMany(TinySam):
    """Builds a mask for each of one class more."""

    def build(self, num_classes: int) -> Promptable:
        return super().build(num_classes + 1)  # type: ignore[no-any-return]


class BatchNormalised(TinySam):
    """Scales by the extremes of the whole batch."""

    def normalise(self, volumes: Tensor) -> Tensor:
        return (volumes - volumes.min()) / (volumes.max() - volumes.min())


class Anonymous(TinySam):
    """Other weights, same key."""

    def identity(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (RandomTwice, "Two builds of RandomTwice"),
        (OneMaskTooMany, "not one square mask for each"),
        (BatchNormalised, "mixes the crops"),
        (Anonymous, "identity of Anonymous is empty"),
    ],
)
def test_a_faulty_model_is_found(model: Any, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_model(model(model.Config(input_size=32)))


class ForgetsTheDecoder(Lora):
    """The export lacks what it names, the decoder, and restores what it has."""

    def export(self, model: Promptable) -> dict[str, Tensor]:
        return {k: v for k, v in super().export(model).items() if not k.startswith("mask_decoder.")}

    def restore(self, model: Promptable, tensors: Mapping[str, Tensor]) -> None:
        super().restore(model, {**super().export(model), **tensors})


class ForgetsToFreeze(Lora):
    """Returns the adapters only, but leaves the decoder trainable."""

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        super().adapt(model)
        return [p for n, p in model.named_parameters() if "lora_" in n]


class TrainsNothing(Lora):
    """Everything is frozen."""

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        super().adapt(model)
        model.requires_grad_(False)
        return []


class ExportsViews(Lora):
    """Hands out the live tensors and copies none on the way in."""

    def export(self, model: Promptable) -> dict[str, Tensor]:
        names = super().export(model)
        live = {n.replace(".default.", "."): p for n, p in model.state_dict().items()}
        return {name: live[name] for name in names}

    def restore(self, model: Promptable, tensors: Mapping[str, Tensor]) -> None:
        super().restore(model, tensors)
        named = dict(model.named_parameters())
        for name in named.keys() & tensors.keys():
            named[name].data = tensors[name]


class TakesAnything(Lora):
    """Restores whatever fits and keeps silent about the rest."""

    def restore(self, model: Promptable, tensors: Mapping[str, Tensor]) -> None:
        own = super().export(model)
        fitting = {k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}
        super().restore(model, {**own, **fitting})


class LossyMerge(Lora):
    """Throws the adapters away instead of folding them in."""

    def merge(self, model: Promptable) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(0.5 if name.startswith("mask_decoder.") else 1.0)


class Speechless(Lora):
    """Refuses without a reason."""

    def refuses(self, model: Any) -> str | None:
        return "no"


@pytest.mark.parametrize(
    ("tuner", "sentence"),
    [
        (ForgetsTheDecoder, "differs from the trained one"),
        (ForgetsToFreeze, "trainable without returning"),
        (TrainsNothing, "nothing to train"),
        (ExportsViews, "shares memory"),
        (TakesAnything, "accepts a missing tensor"),
        (LossyMerge, "`merge` of LossyMerge changes"),
        (Speechless, "without a reason"),
    ],
)
def test_a_faulty_tuner_is_found(tuner: Any, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_tuner(tuner, TinySam(TinySam.Config(input_size=32)))


def test_a_refusal_with_a_reason_keeps_the_contract() -> None:
    class Picky(Lora):  # type: ignore[misc]
        def refuses(self, model: Any) -> str | None:
            return f"{model.title} is too small for it"

    check_tuner(Picky, TinySam())
