"""Faults planted in plug-ins of the other kinds, and in pseudo-labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.config import Frozen, Triple
from cfrbench.contracts import ConcatStrategy, DataSource, Layout, Promptable, Segmenter
from cfrbench.errors import DataError, UsageError
from cfrbench.testing import check_concat, check_data, check_model, check_pseudo, check_segmenter, check_tuner
from cfrbench.volume import Split, Volume

Lora: Any = registry.load("tune", "lora")
TinySam: Any = registry.load("model", "tiny")
VNet: Any = registry.load("net", "vnet")

# ---------------------------------------------------------------------------------------------------------------------
# concatenation


@dataclass(frozen=True)
class StripLayout(Layout):
    """All slices side by side at the top of the canvas."""


class Strip(ConcatStrategy):
    """A sound and simple strategy; the faulty ones below differ from it in one thing."""

    name = "strip"

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> StripLayout:  # fmt: skip
        height, width, depth = shape
        if height > canvas or width * depth > canvas:
            raise UsageError(f"A strip of {shape} needs a canvas of {max(height, width * depth)} pixels.")
        return StripLayout(shape, canvas)

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        height, width, depth = layout.shape
        canvas = volumes.new_full((*volumes.shape[:-3], layout.canvas, layout.canvas), fill)
        canvas[..., :height, : width * depth] = volumes.flatten(-2)
        return canvas.unsqueeze(-3)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        height, width, depth = layout.shape
        return canvases.squeeze(-3)[..., :height, : width * depth].unflatten(-1, (width, depth))


class TurnedStrip(Strip):
    """Comes back upside down."""

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        return super().inverse(canvases, layout).flip(-3)


class LeakyStrip(Strip):
    """Exact there and back by memory, though the last slice is not on the canvas."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        self.kept = volumes
        canvas = super().forward(volumes, layout, fill)
        canvas[..., layout.shape[1] * layout.shape[2] - 1] = fill
        return canvas

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        return self.kept


class UnfilledStrip(Strip):
    """Ignores `fill`, so padding of labels would be class 0."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        return super().forward(volumes, layout, 0)


class FloatStrip(Strip):
    """Labels become floats."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        return super().forward(volumes.float(), layout, fill)


class SlowStrip(Strip):
    """One slice at a time."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        canvas = super().forward(volumes, layout, fill)
        for index in range(layout.shape[2]):
            canvas[..., 0, : layout.shape[0], index : layout.shape[1] * layout.shape[2] : layout.shape[2]].mul_(1)
        return canvas


class MixingStrip(Strip):
    """Volumes of one batch see each other."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        volumes = volumes - volumes.mean() if volumes.ndim > 3 else volumes
        return super().forward(volumes, layout, fill)


class DicedStrip(Strip):
    """Each plan draws its own order of slices, whatever ``draw`` is."""

    def plan(self, shape: Triple, canvas: int, **options: Any) -> StripLayout:
        layout = super().plan(shape, canvas)
        object.__setattr__(layout, "count", 1)
        self.shifts = {**getattr(self, "shifts", {}), id(layout): len(getattr(self, "shifts", {}))}
        self.alive = [*getattr(self, "alive", []), layout]
        return layout

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        return super().forward(volumes.roll(self.shifts[id(layout)], -1), layout, fill)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        return super().inverse(canvases, layout).roll(-self.shifts[id(layout)], -1)


class CurtStrip(Strip):
    """Refuses without a word of help."""

    def plan(self, shape: Triple, canvas: int, **options: Any) -> StripLayout:
        try:
            return super().plan(shape, canvas)
        except UsageError:
            raise UsageError("No.") from None


class NeverFits(Strip):
    """Refuses everything."""

    def plan(self, shape: Triple, canvas: int, **options: Any) -> StripLayout:
        raise UsageError("Nothing fits on any canvas, do not even try.")


class InexactStrip(Strip):
    """States a tolerance that it does not keep."""

    exact = False
    tolerance = 0.01

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        return super().inverse(canvases, layout) * 0.9


def test_the_sound_strip_passes() -> None:
    check_concat(Strip)


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (TurnedStrip, "is off by"),
        (LeakyStrip, "voxels are not on the canvas"),
        (UnfilledStrip, "do not hold `fill`"),
        (FloatStrip, "become torch.float32"),
        (SlowStrip, "loops over them in Python"),
        (MixingStrip, "not laid out independently"),
        (DicedStrip, "two plans of draw 0 differ"),
        (CurtStrip, "without saying what would fit"),
        (NeverFits, "refuses every shape"),
        (InexactStrip, "though the strategy states 0.0"),
    ],
)
def test_a_faulty_strategy_is_found(strategy: type[ConcatStrategy], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_concat(strategy)


# ---------------------------------------------------------------------------------------------------------------------
# foundation models and fine-tuners


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


# ---------------------------------------------------------------------------------------------------------------------
# segmenters


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


# ---------------------------------------------------------------------------------------------------------------------
# data and pseudo-labels


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
