"""What fine-tuning and labelling make of a strategy: canvases drawn, run in parts, averaged, at the right input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.compute import start
from cfrbench.config import ComputeSection, RunConfig, TuningSection
from cfrbench.contracts import ConcatStrategy, Layout, Progress
from cfrbench.errors import CfrbenchError, ConfigError
from cfrbench.pipeline import Bench, adapted
from cfrbench.prepare import WorkingCase
from cfrbench.recipes import study_of
from cfrbench.tuning import CANVASES_PER_PASS, CanvasSegmenter, Labeller, TuningTrainee
from cfrbench_concat.grid import Grid
from cfrbench_concat.scaled import Scaled
from cfrbench_concat.small_size import SmallSize
from cfrbench_concat.upsampled import Upsampled

PATCH = (24, 20, 12)


class Brightness(nn.Module):
    """Stands for the fine-tuned model: class 1 where a pixel is bright; remembers how many canvases came at once."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.prompting = None
        self.sizes: list[int] = []

    def forward(self, canvases: Tensor) -> Tensor:
        self.sizes.append(canvases.shape[0])
        return torch.stack([torch.zeros_like(canvases), canvases], dim=1)


def labeller(concat: ConcatStrategy, network: Any = None, **section: Any) -> Labeller:
    """A labeller on a canvas of 64 pixels, with neither augmentation nor turns."""
    plain = {"canvas": 64, "batch_size": 2, "intensity": "none", "rotflip_canvas": False}
    settings = TuningSection.model_validate(plain | section)
    model = registry.load("model", "tiny")()
    return Labeller(network or Brightness(), model, concat, settings, start(ComputeSection()))


def trainee(concat: ConcatStrategy, **section: Any) -> TuningTrainee:
    """Fine-tuning on three cases whose voxels are all different."""
    cases = []
    for number in range(3):
        image = torch.arange(30 * 26 * 18).reshape(30, 26, 18) + 20_000 * number + 1
        label = (image % 3).to(torch.uint8)
        cases.append(WorkingCase(str(number), image.float(), label, (30, 26, 18), (1.0, 1.0, 1.0)))
    tuner, model = registry.load("tune", "lora")(), registry.load("model", "tiny")()
    network = CanvasSegmenter(model.build(3), model.input_size)
    return TuningTrainee(labeller(concat, network, **section), [], tuner, cases, PATCH, False, seed=0)


def test_each_crop_gives_as_many_canvases_as_asked_for_drawn_anew_each_step() -> None:
    training = trainee(Upsampled(), canvases=5)
    images, labels = training.canvases(Progress(0, 10))
    assert images.shape == labels.shape == (2 * 5, 24, 24)
    assert len({canvas.flatten()[0].item() for canvas in images}) == 10  # no slice twice
    again, other = training.canvases(Progress(0, 10))[0], training.canvases(Progress(1, 10))[0]
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    held = labels != 255
    assert torch.equal((images.long() % 3)[held], labels[held].long())
    assert trainee(Upsampled(), canvases=99).canvases(Progress(0, 10))[0].shape == (2 * 12, 24, 24)


def test_a_strategy_of_one_canvas_does_not_notice_how_many_are_asked_for() -> None:
    one, many = (trainee(Grid(), canvas=128, canvases=number, rotflip_canvas=True) for number in (1, 7))
    for step in range(3):
        for first, second in zip(one.canvases(Progress(step, 3)), many.canvases(Progress(step, 3)), strict=True):
            assert first.shape == (2, 128, 128)
            assert torch.equal(first, second)


def test_plans_for_fine_tuning_hear_how_much_is_over_and_each_crop_has_its_own_draw() -> None:
    class Listening(Upsampled):
        heard: list[tuple[int, float]] = []  # noqa: RUF012

        def plan_training(self, *args: Any, **options: Any) -> Layout:
            self.heard.append((options["draw"], options["done"]))
            return super().plan_training(*args, **options)

    training = trainee(Listening())
    for step in range(4):
        training.canvases(Progress(step, 4))
    assert [done for _, done in Listening.heard] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert len({draw for draw, _ in Listening.heard}) == 8


def test_labelling_runs_many_canvases_in_parts_and_loses_none() -> None:
    network = Brightness()
    crops = torch.randn(2, 1, *PATCH)
    logits = labeller(Upsampled(), network)(crops)
    assert torch.equal(logits[:, 1], crops[:, 0])
    assert network.sizes == [CANVASES_PER_PASS] * 3
    network = Brightness()
    labeller(Grid(), network, canvas=128)(torch.randn(11, 1, *PATCH))
    assert network.sizes == [11]


def test_where_canvases_overlap_probabilities_are_averaged() -> None:
    class OneBright(Brightness):
        """Certain of class 1 on the first canvas, uncertain on the others."""

        def forward(self, canvases: Tensor) -> Tensor:
            logits = torch.zeros(canvases.shape[0], 2, *canvases.shape[1:])
            logits[0, 1] = 1000
            return logits

    logits = labeller(Scaled(), OneBright())(torch.randn(1, 1, 24, 20, 6))  # slices 0-3 and 2-5
    shown = logits.softmax(1)[0, 1, 10, 10]
    assert torch.allclose(shown, torch.tensor([1, 1, 0.75, 0.75, 0.5, 0.5]), atol=1e-5)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("concat", "side"), [(Upsampled(), 64), (SmallSize(), 32), (SmallSize(SmallSize.Config(side=48)), 48)]
)
def test_the_model_is_built_for_the_input_that_the_strategy_asks_for(concat: ConcatStrategy, side: int) -> None:
    source = registry.load("data", "phantom")()
    settings = RunConfig(preset="smoke", set={"tuning.patch": list(PATCH)}).settings(source.protocol("smoke"))
    bench = Bench.of(source, settings)
    made, _ = adapted(bench, concat, registry.load("model", "tiny")(), registry.load("tune", "lora")(), seed=0)
    assert made.foundation.input_size == made.network.input_size == side
    assert made.network.model.image_encoder.pos_embed.shape[1:3] == (side // 16, side // 16)
    with torch.no_grad():
        assert made(torch.randn(1, 1, *PATCH)).shape == (1, source.num_classes, *PATCH)


def test_a_model_says_which_inputs_it_takes() -> None:
    model = registry.load("model", "tiny")()
    assert model.resized(96).input_size == 96
    assert model.resized(96).config.seed == model.config.seed
    with pytest.raises(ConfigError, match=r"model\.tiny.*input_size"):
        model.resized(40)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"concat": "scaled", "set": {"concat.scaled.n": 9}}, "n from 1 to 4"),
        ({"concat": "shuffled", "set": {"tuning.canvas": 40}}, r"tuning\.canvas=64"),
        ({"concat": "rotated", "set": {"tuning.patch": (16, 12, 17)}}, r"16x12x17 voxels .*tuning\.canvas=80"),
        ({"concat": "small-size", "set": {"concat.small-size.side": 40}}, "side"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(asked: dict[str, Any], words: str) -> None:
    config = RunConfig.model_validate({"preset": "smoke", "ssl": ("mt",), "labels": (1,)} | asked)
    with pytest.raises(CfrbenchError, match=words):
        study_of(config).tune(1, 0)
