"""Faults planted in segmenters, data sources and pseudo-labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench.config import Frozen
from cfrbench.contracts import DataSource, Segmenter
from cfrbench.errors import DataError, UsageError
from cfrbench.testing import check_data, check_pseudo, check_segmenter
from cfrbench.volume import Split, Volume


class Plain(Segmenter):
    """One convolution; the faulty ones below differ in one thing."""

    name = "plain"
    divisor = 2

    def build(self, channels: int, num_classes: int) -> nn.Module:
        return PlainNet(channels, num_classes)


class PlainNet(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, num_classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        if any(side % 2 for side in image.shape[2:]):
            raise UsageError("Sides must be multiples of 2.")
        logits: Tensor = self.conv(image)
        return logits


class Careless(Plain):
    """Lets torch complain, or nobody."""

    def build(self, channels: int, num_classes: int) -> nn.Module:
        return nn.Conv3d(channels, num_classes, kernel_size=1)


class UnusedLayer(Plain):
    """A head that no output needs."""

    def build(self, channels: int, num_classes: int) -> nn.Module:
        network = PlainNet(channels, num_classes)
        network.spare = nn.Conv3d(1, 1, 1)
        return network


class BatchMixer(Plain):
    """Normalises over the batch in eval mode too."""

    class Net(PlainNet):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image - image.mean())

    def build(self, channels: int, num_classes: int) -> nn.Module:
        return self.Net(channels, num_classes)


class OwnSeed(Plain):
    """Takes random numbers from a generator that nobody seeds."""

    def build(self, channels: int, num_classes: int) -> nn.Module:
        network = PlainNet(channels, num_classes)
        draw = torch.Generator()
        draw.seed()
        network.conv.weight.data.uniform_(generator=draw)
        return network


class TwoOutputs(Plain):
    """One class more than asked for."""

    def build(self, channels: int, num_classes: int) -> nn.Module:
        return PlainNet(channels, num_classes + 1)


def test_the_sound_segmenter_passes() -> None:
    check_segmenter(Plain)


@pytest.mark.parametrize(
    ("segmenter", "sentence"),
    [
        (Careless, "takes a side of 3"),
        (UnusedLayer, "unused layers"),
        (BatchMixer, "mixes the crops"),
        (OwnSeed, "Two builds of OwnSeed"),
        (TwoOutputs, r"returns \(2, 3"),
    ],
)
def test_a_faulty_segmenter_is_found(segmenter: type[Segmenter], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_segmenter(segmenter)


class Numbers(DataSource):
    """Four small volumes of noise; the faulty ones below differ in one thing."""

    name, title, modality, licence, origin = "numbers", "Numbers", "noise", "none", "made up"
    class_names = ("background", "high")
    budgets = {"scarce": 1}  # noqa: RUF012
    synthetic = True

    class Config(Frozen):
        """None."""

    def split(self) -> Split:
        return Split(train=("a", "b"), test=("c",), val=("d",))

    def load(self, case: str) -> Volume:
        if case not in "abcd":
            raise DataError(f"There is no case {case}. Choose one of a, b, c, d.")
        image = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(ord(case)))
        return Volume(image, (image > 0).to(torch.uint8))

    def fingerprint(self) -> Mapping[str, str]:
        return {case: f"{ord(case):064x}" for case in "abcd"}

    def protocol(self, preset: str) -> Mapping[str, Any]:
        return {"training.patch": (4, 4, 3)}


class Flaky(Numbers):
    """Another image each time."""

    def load(self, case: str) -> Volume:
        volume = super().load(case)
        return Volume(volume.image + torch.randn(1), volume.label)


class Unprinted(Numbers):
    """A case has no fingerprint."""

    def fingerprint(self) -> Mapping[str, str]:
        return {case: text for case, text in super().fingerprint().items() if case != "d"}


class Twins(Numbers):
    """One volume under two names."""

    def fingerprint(self) -> Mapping[str, str]:
        return dict.fromkeys("abcd", f"{1:064x}")


class Unlabelled(Numbers):
    """Nothing to score against."""

    def load(self, case: str) -> Volume:
        return Volume(super().load(case).image, None)


class LooseLabels(Numbers):
    """Labels that no class stands for."""

    def load(self, case: str) -> Volume:
        volume = super().load(case)
        assert volume.label is not None
        return Volume(volume.image, volume.label * 200)


class Misspelt(Numbers):
    """Recommends a setting that does not exist."""

    def protocol(self, preset: str) -> Mapping[str, Any]:
        return {"training.pacth": (4, 4, 3)}


class TooGenerous(Numbers):
    """A budget of more cases than there are."""

    budgets = {"moderate": 16}  # noqa: RUF012


class Credulous(Numbers):
    """Any case name will do."""

    def load(self, case: str) -> Volume:
        return super().load("a" if case not in "abcd" else case)


def test_the_sound_source_passes() -> None:
    check_data(Numbers())


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (Flaky, "another image of a"),
        (Unprinted, r"differ in \['d'\]"),
        (Twins, "under several names"),
        (Unlabelled, "has no label of"),
        (LooseLabels, "unchecked"),
        (Misspelt, "training.pacth"),
        (TooGenerous, "Budgets of TooGenerous"),
        (Credulous, "loads a case that it does not have"),
    ],
)
def test_a_faulty_source_is_found(source: type[DataSource], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_data(source())


@pytest.mark.parametrize("value", [0, 2])
def test_pseudo_labels_of_one_class_are_found(value: int) -> None:
    labels = {case: torch.full((4, 4, 2), value, dtype=torch.uint8) for case in "ab"}
    with pytest.raises(AssertionError, match=f"all 2 cases are class {value}"):
        check_pseudo(labels)
    labels["b"][0, 0, 0] = 1
    check_pseudo(labels)
    with pytest.raises(AssertionError, match="no pseudo-labels"):
        check_pseudo({})
