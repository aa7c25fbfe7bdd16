"""Slices among photographs: a curriculum from none to all, photographs that never teach, a grid in prediction."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cfrbench import registry
from cfrbench.config import RunConfig, Triple
from cfrbench.errors import DataError, UsageError
from cfrbench.recipes import study_of
from cfrbench.tiling import GridLayout, grid_layout, lay_out, smallest_canvas, take_apart
from cfrbench.volume import IGNORE
from cfrbench_concat.natural_mix import MixedLayout, NaturalMix
from cfrbench_concat.photographs import PACKAGED, find_photographs, fingerprint, grey_tiles

shapes = st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 50))
#: few shapes, so that photographs are decoded for few sizes
toy_shapes = st.tuples(st.sampled_from([8, 13]), st.sampled_from([8, 12]), st.integers(1, 12))
dones = st.floats(0, 1, exclude_max=True)
quick = settings(deadline=None, max_examples=25)


def mix(**options: Any) -> NaturalMix:
    return NaturalMix(NaturalMix.Config(**options))


def fitting(shape: Triple, extra: int = 0) -> int:
    return smallest_canvas(lambda side: grid_layout(shape, side), shape) + extra


def plain(shape: Triple, canvas: int) -> GridLayout:
    layout = grid_layout(shape, canvas)
    assert layout is not None
    return layout


def volume_of(shape: Triple, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) * deviation + mean


def medical(layout: MixedLayout) -> list[int]:
    return list(range(layout.first, layout.first + layout.medical))


# ---------------------------------------------------------------------------------------------------------------------
# prediction


def test_it_is_the_registered_strategy() -> None:
    assert registry.load("concat", "natural-mix") is NaturalMix


@quick
@given(shapes, st.integers(0, 30), st.sampled_from([torch.uint8, torch.int64, torch.bfloat16, torch.float32]))
def test_prediction_sees_every_slice_and_no_photograph(shape: Triple, extra: int, dtype: torch.dtype) -> None:
    canvas, strategy = fitting(shape, extra), mix()
    assume(plain(shape, canvas).lossless)  # a larger canvas may cut rims
    layout = strategy.plan(shape, canvas)
    volume = (torch.arange(torch.Size(shape).numel()) * 7 % 251).reshape(shape).to(dtype)
    canvases = strategy.forward(volume, layout, 3)
    assert torch.equal(canvases[0], lay_out(volume, plain(shape, canvas), 3))
    assert torch.equal(strategy.inverse(canvases, layout), volume)


# ---------------------------------------------------------------------------------------------------------------------
# fine-tuning


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 12, 7), (13, 8, 80)])
def test_the_curriculum_runs_from_all_natural_to_all_medical(shape: Triple) -> None:
    strategy, depth, canvas = mix(), shape[2], fitting(shape)
    steps = 10 * (depth + 1)
    counts = [strategy.plan_training(shape, canvas, draw=i, done=i / steps).medical for i in range(steps)]
    assert counts == sorted(counts)
    assert [counts.count(k) for k in range(depth + 1)] == [10] * (depth + 1)  # each number for an equal share
    begin, end = (strategy.plan_training(shape, canvas, done=done) for done in (0.0, counts.index(depth) / steps))
    volume, label = volume_of(shape), torch.ones(shape, dtype=torch.uint8)
    assert bool((strategy.forward(label, begin, IGNORE) == IGNORE).all())
    grid = plain(shape, canvas)
    assert torch.equal(strategy.forward(label, end, IGNORE)[0], lay_out(label, grid, IGNORE))
    assert torch.equal(strategy.forward(volume, end, 0.0)[0], lay_out(volume, grid, 0.0))


@quick
@given(st.integers(1, 12), dones, st.integers(0, 99))
def test_a_fixed_number_of_slices_stays_fixed_and_consecutive(k: int, done: float, draw: int) -> None:
    layout = mix(medical=k).plan_training((8, 8, 12), 64, draw=draw, done=done)
    assert layout.medical == k
    assert 0 <= layout.first <= 12 - k
    assert len(layout.photographs) == 12 - k


@quick
@given(toy_shapes, dones, st.integers(0, 99), st.sampled_from([(), (2,), (2, 3)]))
def test_photographs_never_teach_and_slices_stay_where_they_are(
    shape: Triple, done: float, draw: int, lead: tuple[int, ...]
) -> None:
    strategy, canvas = mix(), fitting(shape)
    layout = strategy.plan_training(shape, canvas, draw=draw, done=done)
    label = torch.randint(0, 4, (*lead, *shape), dtype=torch.uint8)
    volume = torch.rand(*lead, *shape)
    labels, images = strategy.forward(label, layout, IGNORE), strategy.forward(volume, layout, 0.0)
    taught = torch.zeros(shape, dtype=torch.uint8)
    taught[..., medical(layout)] = 1
    grid = plain(shape, canvas)
    teaches = lay_out(taught, grid, 0) == 1
    # Exactly the medical pixels have a label, and it is the right one; image and label agree on where they are.
    assert torch.equal((labels != IGNORE)[..., 0, :, :], teaches.expand(*lead, canvas, canvas))
    assert torch.equal(labels[..., 0, teaches], lay_out(label, grid, IGNORE)[..., teaches])
    assert torch.equal(images[..., 0, teaches], lay_out(volume, grid, 0.0)[..., teaches])
    blank = lay_out(torch.ones(shape, dtype=torch.uint8), grid, 0) == 0
    assert bool((images[..., 0, blank] == 0).all())


def test_photographs_have_the_mean_and_deviation_of_the_volume_they_stand_beside() -> None:
    shape = (32, 24, 6)
    layout = mix(medical=2).plan_training(shape, 128, draw=4)
    volumes = torch.stack([volume_of(shape), volume_of(shape, 0.4, 0.1), volume_of(shape, -300.0, 50.0)])
    mixed = take_apart(mix().forward(volumes, layout, 0.0)[:, 0], layout)
    natural = [k for k in range(6) if k not in medical(layout)]
    for volume, result in zip(volumes, mixed, strict=True):
        for k in natural:
            assert not torch.equal(result[..., k], volume[..., k])
            deviation, mean = torch.std_mean(result[..., k], correction=0)
            assert float(mean) == pytest.approx(float(volume.mean()), abs=1e-3 * float(volume.std()))
            assert float(deviation) == pytest.approx(float(volume.std()), rel=1e-2)
    half = mix().forward(volumes.bfloat16(), layout, 0.0)
    assert half.dtype == torch.bfloat16


def test_a_uniform_volume_and_a_uniform_photograph_give_finite_canvases(tmp_path: Path) -> None:
    Image.new("L", (20, 20), 90).save(tmp_path / "grey.png")
    strategy = mix(root=tmp_path)
    layout = strategy.plan_training((8, 8, 3), 16, done=0.0)
    for volume in (torch.full((8, 8, 3), 2.5), volume_of((8, 8, 3))):
        tiles = take_apart(strategy.forward(volume, layout, 0.0)[0], layout)
        torch.testing.assert_close(tiles, volume.mean().expand(8, 8, 3), rtol=0, atol=1e-5)


@quick
@given(toy_shapes, dones, st.integers(0, 2**62))
def test_one_draw_gives_one_canvas_and_another_draw_another(shape: Triple, done: float, draw: int) -> None:
    canvas = fitting(shape)
    first, again = (mix().plan_training(shape, canvas, draw=draw, done=done) for _ in range(2))
    assert first == again
    volume = volume_of(shape)
    assert torch.equal(mix().forward(volume, first, 0.0), mix().forward(volume, again, 0.0))
    if len(first.photographs) > 3:
        others = {mix().plan_training(shape, canvas, draw=d, done=done).photographs for d in range(8)}
        assert len(others) > 1


def test_photographs_repeat_only_when_there_are_too_few() -> None:
    available = len(PACKAGED)
    few = mix().plan_training((8, 8, available), 64, done=0.0).photographs
    assert sorted(few) == list(range(available))
    many = mix().plan_training((8, 8, 3 * available), 64, done=0.0).photographs
    assert [many.count(n) for n in range(available)] == [3] * available


def test_a_photograph_stands_upright_on_its_tile(tmp_path: Path) -> None:
    ramp = np.arange(12, dtype=np.uint8)[:, None] * 20 + np.arange(8, dtype=np.uint8)[None]
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    strategy = mix(root=tmp_path)
    shape = (8, 12, 1)  # on the canvas 12 rows, 8 columns
    layout = strategy.plan_training(shape, 12, done=0.0)
    volume = volume_of(shape)
    tile = strategy.forward(volume, layout, -99.0)[0]
    assert torch.equal(tile == -99.0, lay_out(torch.ones(shape), plain(shape, 12), -99.0) == -99.0)
    shown = tile[tile != -99.0].view(12, 8)
    ramp_scores = torch.from_numpy((ramp - ramp.mean()) / ramp.std()).float()
    torch.testing.assert_close(shown, ramp_scores * volume.std(correction=0) + volume.mean(), rtol=0, atol=1e-4)


def test_more_slices_than_there_are_is_refused_with_what_would_do() -> None:
    for plan in (mix(medical=90).plan, mix(medical=90).plan_training):
        with pytest.raises(UsageError, match=r"medical=90 .* 16x16x80 .* at most 80"):
            plan((16, 16, 80), 256)
    with pytest.raises(UsageError, match="smallest canvas"):
        mix().plan_training((16, 16, 80), 32)


# ---------------------------------------------------------------------------------------------------------------------
# photographs


def voc(root: Path, names: tuple[str, ...] = ("2007_b", "2007_a", "2008_c"), listed: str | None = None) -> Path:
    images = root / "JPEGImages"
    images.mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", (50, 40), (40 * i, 90, 10)).save(images / f"{name}.jpg")
    if listed is not None:
        (root / "ImageSets" / "Segmentation").mkdir(parents=True)
        (root / "ImageSets" / "Segmentation" / "trainval.txt").write_text(listed)
    return root


def stems(root: Path | None) -> list[str]:
    return [file.stem for file in find_photographs(root)]


def test_the_default_photographs_are_inside_the_wheel_of_scikit_image() -> None:
    assert [file.name for file in find_photographs(None)] == list(PACKAGED)
    tiles = grey_tiles(find_photographs(None), 16, 24)
    assert tiles.shape == (len(PACKAGED), 16, 24)
    assert tiles.dtype == torch.uint8
    assert bool((tiles.float().std((1, 2)) > 1).all()), "a photograph without content"


def test_voc_is_found_where_it_was_unpacked_and_its_segmentation_list_is_kept(tmp_path: Path) -> None:
    listed = voc(tmp_path / "a", listed="2008_c\n2007_a\n")
    assert stems(listed) == ["2007_a", "2008_c"]
    unlisted = voc(tmp_path / "b" / "VOCdevkit" / "VOC2012")
    assert stems(unlisted) == stems(tmp_path / "b") == ["2007_a", "2007_b", "2008_c"]
    broken = voc(tmp_path / "c", listed="2007_a\n2012_gone\n")
    with pytest.raises(DataError, match=r"names 1 images .* 2012_gone\.jpg"):
        find_photographs(broken)


def test_any_folder_of_images_serves(tmp_path: Path) -> None:
    Image.new("L", (9, 9), 3).save(tmp_path / "B.PNG")
    Image.new("RGBA", (9, 30), (1, 2, 3, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 9)).save(tmp_path / "c.jpeg")
    (tmp_path / "notes.txt").write_text("not a photograph")
    assert stems(tmp_path) == ["B", "a", "c"]
    assert grey_tiles(find_photographs(tmp_path), 7, 5).shape == (3, 7, 5)


def test_a_missing_or_empty_folder_is_one_paragraph_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file.jpg").touch()
    (tmp_path / "empty").mkdir()
    for root, words in (("gone", "does not exist"), ("file.jpg", "is no folder"), ("empty", "holds no image file")):
        with pytest.raises(DataError, match=f"{words}.*concat.natural-mix.root.*scikit-image") as caught:
            mix(root=tmp_path / root).plan_training((8, 8, 3), 32)
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError, match=words):
            mix(root=tmp_path / root).identity()


@pytest.mark.parametrize("name", ["broken.jpg", "broken.png"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_a_broken_photograph_is_named(tmp_path: Path, name: str, share: float) -> None:
    source = find_photographs(None)[PACKAGED.index("rocket.jpg" if name.endswith("jpg") else "coins.png")]
    content = source.read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    strategy = mix(root=tmp_path)
    layout = strategy.plan_training((8, 8, 3), 32, done=0.0)
    with pytest.raises(DataError, match=rf"{name} cannot be read: .* Copy it again"):
        strategy.forward(volume_of((8, 8, 3)), layout, 0.0)


def test_the_identity_follows_names_and_contents_wherever_they_lie(tmp_path: Path) -> None:
    first = voc(tmp_path / "first")
    shutil.copytree(first, tmp_path / "second")
    same, other = (mix(root=tmp_path / name).identity() for name in ("first", "second"))
    assert same == other != mix().identity()
    (tmp_path / "second" / "JPEGImages" / "2007_a.jpg").rename(tmp_path / "second" / "JPEGImages" / "2009_a.jpg")
    renamed = fingerprint(sorted((tmp_path / "second" / "JPEGImages").iterdir()))
    Image.new("L", (9, 9)).save(first / "JPEGImages" / "2007_a.jpg")
    changed = fingerprint(find_photographs(first))
    assert len({same, renamed, changed}) == 3


def tune_recipe(concat: str, **values: Any) -> tuple[str, Any]:
    """Key of fine-tuning, and what it says of the strategy."""
    phantom = {"data.phantom.train": 3, "data.phantom.test": 1, "data.phantom.shape": (32, 32, 16)}
    options = {f"concat.{concat}.{option}": value for option, value in values.items()}
    config = RunConfig(preset="smoke", concat=concat, set=phantom | options)
    task = study_of(config).tune(1, 0)
    return task.key, task.recipe["concat"]


def test_photographs_are_part_of_the_key_and_strategies_without_files_have_the_key_they_had(tmp_path: Path) -> None:
    assert set(tune_recipe("grid")[1]) == {"name", "version", "options"}
    assert tune_recipe("natural-mix")[1]["identity"] == mix().identity()
    Image.new("L", (9, 9), 10).save(tmp_path / "a.png")
    first, _ = tune_recipe("natural-mix", root=str(tmp_path))
    assert first == tune_recipe("natural-mix", root=str(tmp_path))[0]
    Image.new("L", (9, 12), 10).save(tmp_path / "a.png")
    find_photographs.cache_clear()
    assert tune_recipe("natural-mix", root=str(tmp_path))[0] != first
    (tmp_path / "a.png").unlink()
    find_photographs.cache_clear()
    with pytest.raises(DataError, match="holds no image file"):
        tune_recipe("natural-mix", root=str(tmp_path))
