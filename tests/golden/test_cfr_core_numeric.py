"""Losses, schedules, crops, sampler, sliding windows and metrics against what the CFR repository's functions gave."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfrbench import losses, sampling, schedules
from cfrbench.config import Settings, Triple
from cfrbench.inference import pad_to, predict_probabilities, window_starts
from cfrbench.metrics import Scores, score_case
from tests.golden.ledger import ledger
from tests.golden.samplers import sampler_setups

BOOK = ledger("cfr_core")
FINE_TUNING_SMOOTH = 1e-10  # of the Dice loss in both loops of the repository
TUNING, TRAINING = Settings().tuning, Settings().training


def names(group: str, leaf: str) -> list[str]:
    """The x of every key ``group/x/leaf``."""
    found = (re.fullmatch(rf"{group}/([^/]+)/{leaf}", key) for key in BOOK.keys(f"{group}/"))
    cases = [match.group(1) for match in found if match]
    assert cases, f"no case in {group}/"
    return cases


def tensor(key: str) -> Tensor:
    return torch.from_numpy(BOOK.take(key))


def triple(key: str) -> Triple:
    x, y, z = (int(n) for n in BOOK.take(key))
    return x, y, z


def close(got: Any, key: str, rtol: float = 5e-5) -> None:
    np.testing.assert_allclose(np.asarray(got), BOOK.take(key), rtol=rtol, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# loss


def test_fine_tuning_loss_and_gradient() -> None:
    logits, label = tensor("loss/logits2d").requires_grad_(), tensor("loss/label2d")
    total = losses.ce_dice(logits, label, smooth=FINE_TUNING_SMOOTH)
    (gradient,) = torch.autograd.grad(total, logits)
    probabilities = logits.detach().softmax(1)
    close(losses.cross_entropy(logits.detach(), label), "loss/ce2d")
    close(losses.dice_loss(probabilities, label, smooth=FINE_TUNING_SMOOTH), "loss/dice2d")
    close(total.detach(), "loss/total2d")
    expected = BOOK.take("loss/grad2d")
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


def test_dice_sees_no_class_where_the_label_is_255() -> None:
    label = tensor("loss/label2d")
    counts = BOOK.take("loss/dice2d_onehot_channels")
    # With certain and right predictions, 1 - Dice reads the pixels of each class back.
    for name, count in enumerate(counts):
        assert int((label == name).sum()) == count
    perfect = torch.stack([(label == name).float() for name in range(len(counts))], dim=1)
    assert float(losses.dice_loss(perfect, label)) == pytest.approx(0.0, abs=1e-6)
    # A pixel labelled 255 belongs to no class, but what is predicted there still costs.
    everywhere = torch.where((label == 255).unsqueeze(1), 1.0, perfect)
    ignored = int((label == 255).sum())
    expected = np.mean(1 - (2 * counts + losses.SMOOTH) / (2 * counts + ignored + losses.SMOOTH))
    assert float(losses.dice_loss(everywhere, label)) == pytest.approx(expected, rel=1e-5)


def test_volume_losses() -> None:
    logits, teacher, label = tensor("loss/logits3d"), tensor("loss/teacher3d"), tensor("loss/label3d")
    probabilities = logits.softmax(1)
    close(losses.cross_entropy(logits, label, ignore=None), "loss/ce3d")
    close(losses.dice_loss(probabilities, label, smooth=FINE_TUNING_SMOOTH), "loss/dice3d")
    nothing = torch.zeros_like(label)
    close(losses.dice_loss(probabilities, nothing, smooth=FINE_TUNING_SMOOTH), "loss/dice3d_all_background")
    close(losses.softmax_mse(logits, teacher).mean(), "loss/softmax_mse_mean")
    close(losses.softmax_kl_mean(logits, teacher), "loss/softmax_kl")
    close(losses.softmax_dice(logits, teacher), "loss/softmax_dice")
    close(losses.foreground_dice_loss(probabilities[:, 1], label == 1), "loss/dice_loss_sq_fg")
    close(losses.linear_dice_loss(probabilities[:, 1], label == 1), "loss/dice_loss1_lin_fg")


def test_retraining_loss() -> None:
    logits, teacher = tensor("loss/logits3d"), tensor("loss/teacher3d")
    pseudo = tensor("loss/retrain_pseudo")
    label = tensor("loss/label3d")[: len(logits) - len(pseudo)]
    supervised = losses.ce_dice(logits[: len(label)], label, smooth=FINE_TUNING_SMOOTH)
    guidance = losses.ce_dice(logits[len(label) :], pseudo, smooth=FINE_TUNING_SMOOTH)
    weight = schedules.consistency_weight(int(BOOK.take("loss/retrain_iter")), 0.1, 40)
    close(supervised + guidance + weight * losses.softmax_mse(logits, teacher).mean(), "loss/retrain_total")


# ---------------------------------------------------------------------------------------------------------------------
# sched


def test_ramps() -> None:
    close([schedules.consistency_weight(int(t), 0.1, 40) for t in BOOK.take("sched/iters")], "sched/consistency_weight")
    current = BOOK.take("sched/rampup_cur")
    for name, ramp in (("sigmoid", schedules.sigmoid_rampup), ("linear", schedules.linear_rampup)):
        (key,) = BOOK.keys(f"sched/{name}_rampup")
        length = float(key.rpartition("rampup")[2])
        close([ramp(float(c), length) for c in current], key)
    length = wave_length(current, BOOK.take("sched/cosine_rampdown"))
    close([schedules.cosine_rampdown(float(c), length) for c in current], "sched/cosine_rampdown")
    close([schedules.ema_decay(int(t)) for t in BOOK.take("sched/ema_alpha_iters")], "sched/ema_alpha")


def wave_length(steps: NDArray[Any], values: NDArray[Any]) -> int:
    """The length of the half cosine wave, which the file does not name, from the one value nearest to its middle."""
    middle = int(np.abs(values - 0.5).argmin())
    return round(np.pi * steps[middle] / np.arccos(2 * values[middle] - 1))


def test_learning_rates_of_the_default_settings() -> None:
    # A rate that is set after step t - 1, with the counter at t, is the one in force during step t.
    steps = [int(t) for t in BOOK.take("sched/lr_iters")]
    lr, total, power = TUNING.lr, TUNING.steps, TUNING.poly_power
    (key,) = BOOK.keys("sched/lr_finetune_warmup")
    for name, warmup in (("sched/lr_finetune_poly", 0), (key, int(key.rpartition("warmup")[2]))):
        rates = [schedules.learning_rate("finetune", lr, t, total, power=power, warmup_steps=warmup) for t in steps]
        close(rates, name)
    lr, total = TRAINING.lr, TRAINING.steps
    assert TRAINING.lr_policy == "step"
    close([schedules.learning_rate("step", lr, t, total) for t in steps], "sched/lr_retrain_step")
    close([schedules.learning_rate("poly-b", lr, t, total) for t in steps], "sched/lr_retrain_btcv_poly")


# ---------------------------------------------------------------------------------------------------------------------
# crop, rotflip3d, sampler


def crops() -> tuple[Tensor, Tensor]:
    return tensor("crop/image"), tensor("crop/label")


@pytest.mark.parametrize("case", [name for name in names("crop", "size") if name.startswith("rand")])
def test_random_crop_is_one_of_those_the_official_rule_can_draw(case: str) -> None:
    image, label = crops()
    patch = triple(f"crop/{case}/size")
    expected_image, expected_label = tensor(f"crop/{case}/image"), tensor(f"crop/{case}/label")
    pads = sampling.padding(triple_of(image), patch)
    xs, ys, zs = (range(s + 2 * p - n) for s, p, n in zip(image.shape, pads, patch, strict=True))
    hits = [
        start
        for start in product(xs, ys, zs)
        if torch.equal(sampling.random_crop(image, patch, start), expected_image)
        and torch.equal(sampling.random_crop(label, patch, start), expected_label)
    ]
    assert len(hits) == 1
    fast = sampling.CropDraw(triple_of(image), patch, hits[0])
    assert torch.equal(sampling.take_crop(image, fast), expected_image)
    assert torch.equal(sampling.take_crop(label, fast), expected_label)


@pytest.mark.parametrize("case", [name for name in names("crop", "size") if name.startswith("center")])
def test_center_crop(case: str) -> None:
    patch = triple(f"crop/{case}/size")
    for volume, key in zip(crops(), ("image", "label"), strict=True):
        assert torch.equal(sampling.center_crop(volume, patch), tensor(f"crop/{case}/{key}"))


@pytest.mark.parametrize("case", names("rotflip3d", "image"))
def test_rotflip(case: str) -> None:
    draws = np.random.RandomState(int(case.removeprefix("s")))
    turns, axis = draws.randint(0, 4), draws.randint(0, 2)
    for volume, key in zip(crops(), ("image", "label"), strict=True):
        assert torch.equal(sampling.rotflip(volume, turns, axis), tensor(f"rotflip3d/{case}/{key}"))


def test_two_stream_sampler() -> None:
    epochs = [BOOK.take(key) for key in BOOK.keys("sampler/epoch")]
    seeds = {seed for seed, _, _ in sampler_setups(epochs, seeds=range(10_000))}
    assert len(seeds) == 1
    assert all(len(epoch) == int(BOOK.take("sampler/len")) for epoch in epochs)
    for key in BOOK.keys("sampler/la"):
        setups = sampler_setups([BOOK.take(key)], seeds)
        labelled = int(re.findall(r"la(\d+)_", key)[0])
        assert labelled in {count for _, count, _ in setups}


def triple_of(volume: Tensor) -> Triple:
    x, y, z = volume.shape
    return x, y, z


# ---------------------------------------------------------------------------------------------------------------------
# slide


@pytest.mark.parametrize("case", names("slide", "image"))
def test_sliding_window(case: str) -> None:
    image, patch = tensor(f"slide/{case}/image"), triple(f"slide/{case}/patch")
    stride_xy, stride_z = (int(n) for n in BOOK.take(f"slide/{case}/stride_xy_z"))
    classes = int(BOOK.take(f"slide/{case}/num_classes"))
    factors = torch.arange(1, classes + 1).view(1, -1, 1, 1, 1)
    seen: list[tuple[int, int]] = []
    score = predict_probabilities(
        lambda window: window * factors, image, patch, stride_xy, stride_z, classes, on_window=lambda *a: seen.append(a)
    )
    np.testing.assert_allclose(score, BOOK.take(f"slide/{case}/score"), atol=1e-6)
    assert torch.equal(losses.class_map(score[None])[0], tensor(f"slide/{case}/label"))
    total = int(BOOK.take(f"slide/{case}/n_windows"))
    assert seen == [(i, total) for i in range(1, total + 1)]
    sides = pad_to(image, patch)[0].shape
    counts = [len(window_starts(*axis)) for axis in zip(sides, patch, (stride_xy, stride_xy, stride_z), strict=True)]
    assert int(np.prod(counts)) == total


# ---------------------------------------------------------------------------------------------------------------------
# metric, allcase


def row(scores: Scores, columns: list[str]) -> list[float]:
    """The scores in the order and unit of the officials: fractions."""
    values = {"dice": scores.dice / 100, "jaccard": scores.jaccard / 100, "hd95": scores.hd95, "asd": scores.asd}
    return [values[column] for column in columns]


def columns() -> list[str]:
    return [str(name) for name in BOOK.take("metric/columns")]


@pytest.mark.parametrize("case", names("metric", "value"))
def test_metrics_both_ways(case: str) -> None:
    prediction, truth = BOOK.take(f"metric/{case}/pred"), BOOK.take(f"metric/{case}/gt")
    close(row(score_case(prediction, truth, 2)[1], columns()), f"metric/{case}/value", 1e-9)
    close(row(score_case(truth, prediction, 2)[1], columns()), f"metric/{case}/value_swapped", 1e-9)


def test_merged_foreground_of_several_classes() -> None:
    merged = BOOK.take("metric/multiclass_merged_value")
    # The masks stored for it are those of a case; which one is not said, its value is.
    cases = [c for c in names("metric", "value") if np.allclose(BOOK.arrays[f"metric/{c}/value"], merged)]
    assert cases
    prediction, truth = BOOK.take(f"metric/{cases[0]}/pred"), BOOK.take(f"metric/{cases[0]}/gt")
    np.testing.assert_allclose(row(score_case(prediction * 3 > 0, truth > 0, 2)[1], columns()), merged, rtol=1e-9)


def test_an_empty_truth_stops_the_official_code_and_has_a_score_here() -> None:
    from medpy.metric import binary

    case = names("metric", "value")[0]
    prediction = BOOK.take(f"metric/{case}/pred")
    nothing = np.zeros_like(prediction)
    with pytest.raises(RuntimeError) as caught:
        binary.hd95(prediction, nothing)
    assert f"RuntimeError: {caught.value}" == str(BOOK.take("metric/empty_gt_status"))
    assert row(score_case(prediction, nothing, 2, empty="paper")[1], columns()) == [0.0] * 4


def test_all_cases_of_a_folder() -> None:
    patch = triple("allcase/patch")
    stride_xy, stride_z = (int(n) for n in BOOK.take("allcase/stride_xy_z"))
    numbers = [key.removeprefix("allcase/image") for key in BOOK.keys("allcase/image")]

    def forward(window: Tensor) -> Tensor:
        return torch.cat([torch.full_like(window, 1.2), window], dim=1)

    rows: list[list[float]] = []
    for number in numbers:
        image = standardised(BOOK.take(f"allcase/image{number}"))
        score = predict_probabilities(forward, image, patch, stride_xy, stride_z, 2)
        prediction = losses.class_map(score[None])[0]
        scores = score_case(prediction, BOOK.take(f"allcase/label{number}"), 2, empty="paper")
        rows.append(row(scores[1], columns()))
    close(np.mean(rows, axis=0), "allcase/avg", 1e-6)
    close(np.std(rows, axis=0, ddof=1), "allcase/std", 1e-6)


def standardised(image: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy((image - image.mean()) / image.std())
