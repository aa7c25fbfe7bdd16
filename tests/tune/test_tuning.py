"""Training fine-tuners: where the loss is taken, accumulation, embeddings remembered; a file that reloads anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrbench import pipeline, registry
from cfrbench.config import ComputeSection, RunConfig, Settings, TuningSection, override
from cfrbench.contracts import Phase, Progress
from cfrbench.errors import ConfigError, WeightsError
from cfrbench.formats import read_tensors, write_tensors
from cfrbench.losses import cross_entropy, dice_loss
from cfrbench.prepare import WorkingCase
from cfrbench.recipes import open_source, study_of
from cfrbench.slices import WholeSlices
from cfrbench.stages import make, open_tuned
from cfrbench.training import Schedule, Trainee, fit, sgd
from cfrbench.tuning import Embeddings, TuningTrainee
from cfrbench_concat.grid import Grid
from tests.tune.models import FORMS, foundation, tuner_of, words

PATCH = (16, 12, 4)
PLAIN = {"canvas": 64, "batch_size": 1, "intensity": "none", "rotflip_canvas": False}


def bench(**section: Any) -> pipeline.Bench:
    values = {"data.phantom.train": 2, "data.phantom.test": 1, "data.phantom.shape": (24, 16, 8)}
    source = open_source("phantom", None, values)
    settings = RunConfig(preset="smoke", set=values).settings(source.protocol("smoke"))
    tuning = TuningSection.model_validate(PLAIN | {"patch": PATCH, "steps": 2} | section)
    compute = ComputeSection(threads=1)
    return pipeline.Bench.of(source, settings.model_copy(update={"tuning": tuning, "compute": compute}))


def cases() -> list[WorkingCase]:
    """Two volumes of which only one crop is ever drawn."""
    found, shape = [], (PATCH[0] + 1, PATCH[1] + 1, PATCH[2] + 1)
    for number in range(2):
        image = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        label = (image > 0.7).to(torch.uint8)
        found.append(WorkingCase(str(number), image, label, shape, (1.0, 1.0, 1.0)))
    return found


def trainee(name: str = "decoder-only", options: Mapping[str, Any] = {}, **section: Any) -> TuningTrainee:
    home, tuner = bench(**section), tuner_of(name, **options)
    labeller, parameters = pipeline.adapted(home, Grid(), foundation("tiny"), tuner, seed=0)
    return TuningTrainee(labeller, parameters, tuner, cases(), PATCH, False, seed=0)


def trained(training: TuningTrainee, steps: int = 6, parts: int = 1) -> dict[str, Tensor]:
    schedule = Schedule(steps, lambda step, total: 0.1, parts=parts)
    fit(training, schedule, sgd(training.parameters(), 0.1, 0.9, 0.0), seed=0)
    return training.state()


# the loss -----------------------------------------------------------------------------------------------------------


def test_the_loss_of_samed_is_taken_on_thinned_labels() -> None:
    settings: dict[str, Any] = {"loss_at": "logits", "dice_weight": 0.8, "dice_smooth": 1e-5}
    training = trainee(**settings)
    canvases, labels = training.canvases(Progress(0, 1))
    low = training.network.low(canvases)
    step = labels.shape[-1] // low.shape[-1]
    assert step == 4
    thin = labels[:, ::step, ::step]
    expected = 0.2 * cross_entropy(low, thin) + 0.8 * dice_loss(low.softmax(1), thin, smooth=1e-5)
    torch.testing.assert_close(training.losses(Progress(0, 1))["segmentation"], expected)


def test_by_default_the_loss_is_taken_on_the_canvas_in_equal_halves() -> None:
    training = trainee()
    canvases, labels = training.canvases(Progress(0, 1))
    full = F.interpolate(training.network.low(canvases), labels.shape[-1], mode="bilinear", align_corners=False)
    expected = 0.5 * (cross_entropy(full, labels) + dice_loss(full.softmax(1), labels, smooth=1e-10))
    torch.testing.assert_close(training.losses(Progress(0, 1))["segmentation"], expected)


class Line(Trainee):
    """One number w; batch k pulls it towards k."""

    def __init__(self) -> None:
        self.w = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int]] = []

    def parameters(self) -> list[nn.Parameter]:
        return [self.w]

    def losses(self, progress: Progress) -> dict[str, Tensor]:
        self.seen.append((progress.step, progress.part))
        target = 3.0 * progress.step + progress.part
        return {"line": 0.5 * (self.w - target).square()}

    def state(self) -> dict[str, Tensor]:
        return {"w": self.w.detach().clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.w.data.copy_(state["w"])


def test_accumulated_batches_make_one_update_by_their_mean_gradient() -> None:
    line, logged = Line(), []
    schedule = Schedule(2, lambda step, total: 0.5, (Phase("train"),), parts=3)
    fit(
        line, schedule, sgd([line.w], 0.5, 0.0, 0.0), seed=0, on_step=lambda step, values: logged.append(values["loss"])
    )
    assert line.seen == [(step, part) for step in range(2) for part in range(3)]
    first = 0.5 * 1.0  # towards the mean of 0, 1, 2
    assert line.w.item() == pytest.approx(first + 0.5 * (4.0 - first))
    assert logged[0] == pytest.approx((0.0 + 0.5 + 2.0) / 3)


def test_each_accumulated_batch_is_another_one() -> None:
    training = trainee(accumulate=2)
    seen = [training.canvases(Progress(step, 2, part=part))[0] for step in range(2) for part in range(2)]
    plain = trainee()
    for batch, images in enumerate(seen):
        assert torch.equal(images, plain.canvases(Progress(batch, 4))[0])


# embeddings ---------------------------------------------------------------------------------------------------------


def test_embeddings_of_a_frozen_encoder_are_computed_once_and_exact() -> None:
    remembering, forgetful = trainee(batch_size=2), trainee(batch_size=2)
    assert remembering.embeddings is not None
    forgetful.embeddings = Embeddings(capacity=0)
    first, second = trained(remembering), trained(forgetful)
    assert remembering.embeddings.hits == 2 * 6 - 2  # two crops, seen twelve times
    assert forgetful.embeddings.hits == 0
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("decoder-only", {"intensity": "bezier"}),
        ("decoder-only", {"rotflip_canvas": True}),
        ("decoder-only", {"zoom": 1.1}),
        ("encoder-decoder", {}),
        ("lora", {}),
    ],
)
def test_nothing_is_remembered_where_it_would_be_wrong(name: str, section: dict[str, Any]) -> None:
    assert trainee(name, **section).embeddings is None


def test_the_oldest_embedding_is_forgotten() -> None:
    embeddings, encoder = Embeddings(capacity=2), nn.Identity()
    for value in (0, 1, 2, 0, 0):
        embeddings(encoder, torch.full((1, 3, 4, 4), float(value)))
    assert embeddings.hits == 1


# whole slices -------------------------------------------------------------------------------------------------------


def test_whole_slices_come_back_exactly() -> None:
    volume = torch.randn(2, 5, 9, 7, 4)
    plan = WholeSlices().plan((9, 7, 4), 1024)
    canvases = WholeSlices().forward(volume, plan, fill=-1.0)
    assert canvases.shape == (2, 5, 4, 9, 9)
    assert torch.equal(canvases[..., 2, :, :7], volume[..., 2])
    assert bool((canvases[..., 7:] == -1).all())
    assert torch.equal(WholeSlices().inverse(canvases, plan), volume)


def test_a_model_that_takes_slices_gets_a_crop_whole_and_turned_as_one() -> None:
    training = trainee("msa-adapter-3d", batch_size=2, rotflip_canvas=True)
    images, labels = training.canvases(Progress(0, 1))
    assert images.shape == labels.shape == (2, PATCH[2], 16, 16)
    padding = (labels == 255).all(0).all(0)
    assert int(padding.sum()) < 2 * 16 * 4  # the same border in every slice
    for volume in labels:
        assert bool(((volume == 255) == (volume[0] == 255)).all())
    assert training.losses(Progress(0, 1))["segmentation"].requires_grad


def test_a_strategy_that_would_not_be_used_is_refused() -> None:
    config = RunConfig(preset="smoke", tune="sam3d-adapter", concat="shuffled")
    with pytest.raises(ConfigError, match="Leave --concat away"):
        study_of(config)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lora", {}, (1e-3, "canvas", 0.5)),
        ("lora", {"preset": "samed"}, (0.005, "logits", 0.8)),
        ("lora", {"preset": "samed", "rank": 8}, (0.005, "logits", 0.8)),
        ("decoder-only", {"schedule": "original"}, (1e-5, "logits", 0.5)),
    ],
)
def test_named_settings_bring_their_training_and_the_user_has_the_last_word(
    name: str, options: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    values = {f"tune.{name}.{key}": value for key, value in options.items()}
    section = study_of(RunConfig(preset="smoke", tune=name, set=values)).settings.tuning
    assert (section.lr, section.loss_at, section.dice_weight) == expected
    section = study_of(RunConfig(preset="smoke", tune=name, set=values | {"tuning.lr": 0.5})).settings.tuning
    assert (section.lr, section.loss_at, section.dice_weight) == (0.5, *expected[1:])


def test_every_schedule_of_authors_is_one_that_fine_tuning_knows() -> None:
    asked = [name for name in registry.names("tune") if "schedule" in registry.load("tune", name).Config.model_fields]
    assert len(asked) >= 6
    for name in asked:
        assert tuner_of(name).protocol() == {}
        values = tuner_of(name, schedule="original").protocol()
        assert values
        assert override(Settings(), values) != Settings()


@pytest.mark.parametrize("name", ["decoder-only", "encoder-decoder"])
def test_the_trainers_of_medsam_augment_nothing(name: str) -> None:
    section = study_of(RunConfig(preset="smoke", tune=name, set={f"tune.{name}.schedule": "original"})).settings.tuning
    assert (section.intensity, section.rotflip, section.rotflip_canvas) == ("none", False, False)


# one file -----------------------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
import torch
from cfrbench.stages import open_tuned
from cfrbench.formats import write_tensors
folder = Path(sys.argv[1])
crops = torch.linspace(-2, 2, 2 * 16 * 12 * 4).sin().view(2, 1, 16, 12, 4)
found = {file.stem: open_tuned(file)(crops) for file in sorted(folder.glob("*.safetensors"))}
write_tensors(folder / "found.out", found)
"""


def tuned_file(folder: Path, name: str, options: dict[str, Any]) -> tuple[Path, Tensor]:
    """A model fine-tuned for two steps as a stage would, its file, and what it says of two crops."""
    home, tuner = bench(), tuner_of(name, **options)
    labelled = home.source.split().labelled(1)
    labeller = pipeline.fine_tune(home, labelled, Grid(), foundation("tiny"), tuner, seed=0)
    plugins = {"concat": ("grid", {}), "tune": (name, options), "model": ("tiny", {"input_size": 64}),
               "data": ("phantom", home.source.config.model_dump(mode="json"))}  # fmt: skip
    recipe: dict[str, Any] = {
        kind: {"name": plugin, "options": values, "version": registry.version(kind, plugin)}
        for kind, (plugin, values) in plugins.items()
    }
    recipe["model"]["identity"] = foundation("tiny").identity()
    sections = home.settings.model_dump(mode="json")
    recipe |= {"seed": 0, "settings": {key: sections[key] for key in ("grid", "tuning", "compute")}}
    path = folder / f"{name}-{words(options)}.safetensors"
    write_tensors(path, tuner.export(labeller.network.model), {"recipe": recipe})
    tuner.merge(labeller.network.model)
    labeller.network.eval()
    crops = torch.linspace(-2, 2, 2 * 16 * 12 * 4).sin().view(2, 1, *PATCH)
    return path, labeller(crops)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("tuned")
    made = [tuned_file(folder, name, options) for name, options in FORMS]
    return folder, {path.stem: logits for path, logits in made}


def test_one_file_is_enough_for_a_new_process_to_say_the_same_bit_for_bit(
    tuned: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, expected = tuned
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = read_tensors(folder / "found.out")
    assert found.keys() == expected.keys()
    assert {name: torch.equal(found[name], logits) for name, logits in expected.items()} == dict.fromkeys(found, True)
    assert len({float(logits.sum()) for logits in expected.values()}) == len(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tune": {"version": "cfrbench 99.0"}},
            r"made with tune\.lora of cfrbench 99\.0, but cfrbench .* is installed",
        ),
        ({"concat": {"version": "other 1.0"}}, r"concat\.grid of other 1\.0"),
        ({"model": {"identity": "tiny-7"}}, "other weights of tiny .* tiny-7"),
        (None, "does not say what it was made of"),
    ],
)
def test_a_file_that_needs_something_else_is_refused(
    tuned: tuple[Path, dict[str, Tensor]], tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    from cfrbench.formats import read_metadata

    file = tuned[0] / "lora-default.safetensors"
    metadata = read_metadata(file)
    if change is None:
        metadata = {}
    else:
        ((kind, values),) = change.items()
        metadata["recipe"][kind] |= values
    write_tensors(tmp_path / "other.safetensors", read_tensors(file), json.loads(json.dumps(metadata)))
    with pytest.raises(WeightsError, match=message):
        open_tuned(tmp_path / "other.safetensors")


# prompts in training ------------------------------------------------------------------------------------------------


def test_prompts_come_from_labels_in_training_and_from_the_prior_in_prediction() -> None:
    training = trainee("decoder-only", {"prompt": "box"})
    assert training.prior is not None
    assert float(training.prior.occupancy.sum()) > 0
    loss = training.losses(Progress(0, 1))["segmentation"]
    loss.backward()  # type: ignore[no-untyped-call]
    head = training.network.model.mask_decoder
    assert bool(head.get_parameter("mask_tokens.weight").grad.any())  # type: ignore[union-attr]
    training.network.eval()
    crop = cases()[0].image[None, None, :-1, :-1, :-1]
    label = torch.zeros(1, *PATCH, dtype=torch.uint8)
    label[:, 2:6, 3:5] = 1
    told, guessed = training.labeller(crop, label), training.labeller(crop)
    assert told.shape == guessed.shape == (1, 2, *PATCH)
    assert not torch.equal(told, guessed)


def test_no_fine_tuning_says_what_the_model_reaches_with_prompts_of_its_own_labels() -> None:
    home, tuner = bench(), tuner_of("none")
    labelled = home.source.split().labelled(1)
    labeller = pipeline.fine_tune(home, labelled, Grid(), foundation("tiny"), tuner, seed=0)
    assert 0.0 <= pipeline.prompted_dice(home, labeller, labelled) <= 100.0

    class Oracle:
        """Says what it was told."""

        network = labeller.network

        def __call__(self, crops: Tensor, labels: Tensor) -> Tensor:
            return 9.0 * torch.stack([labels == 0, labels == 1], dim=1).float()

    assert pipeline.prompted_dice(home, Oracle(), labelled) == pytest.approx(100.0)  # type: ignore[arg-type]


def test_instances_come_from_recipes() -> None:
    plugin = {"name": "lora", "options": {"preset": "samed_s"}}
    tuner = make("tune", plugin)
    assert tuner.config.decoder == "lora"
    assert make("tune", plugin | {"options": tuner.config.model_dump(mode="json")}).config == tuner.config
    assert replace(Progress(1, 2), part=3).part == 3
