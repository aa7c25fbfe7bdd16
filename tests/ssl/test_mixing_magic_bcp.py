"""MagicNet and BCP: what is moved comes back or goes together, and each loss is what its formula says."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfrbench import registry
from cfrbench.config import Triple
from cfrbench.contracts import Batch, Progress
from cfrbench.cubes import (
    blend,
    class_weights,
    cut,
    join_transposed,
)
from cfrbench.errors import ConfigError, UsageError
from cfrbench.losses import class_map, cross_entropy, dice_loss
from cfrbench.pasting import (
    box_sides,
    draw_corner,
    labelled_ce_dice,
    labelled_dice_loss,
    largest_components,
    only,
    outside_box,
    paste,
)
from cfrbench.testing import check_ssl
from cfrbench.volume import IGNORE
from tests.ssl.spy import Spy

SIDES: Triple = (8, 4, 4)
SELF_TRAINING = Progress(100, 200, 1, 50, 100)

few = st.integers(1, 4)
triples = st.tuples(few, few, few)
seeds = st.integers(0, 99)
quick = settings(deadline=None, max_examples=40)


def batch_of(labelled: int = 2, unlabelled: int = 2, classes: int = 2, *, pseudo: bool = False) -> Batch:
    """Random crops whose labels follow the intensity."""
    draw = torch.Generator().manual_seed(labelled + 10 * unlabelled)
    image = torch.randn(labelled + unlabelled, 1, *SIDES, generator=draw)
    labels = torch.bucketize(image[:, 0].contiguous(), torch.linspace(-1.0, 1.0, classes + 1)[1:-1]).to(torch.uint8)
    return Batch(image, labels[:labelled], labels[labelled:].flip(1) if pseudo else None)


def built(name: str, classes: int = 2, crop: Triple = SIDES, **options: Any) -> Any:
    """The plug-in on networks that look at voxels one by one, in train mode, as re-training makes it."""
    plugin = registry.load("ssl", name)
    torch.manual_seed(0)
    method = plugin(lambda: Spy(classes), classes, plugin.Config(**options))
    method.fit_to(crop)
    return method.train()


# ---------------------------------------------------------------------------------------------------------------------
# MagicNet


def plain_dice(logits: Tensor, target: Tensor) -> Tensor:
    return dice_loss(logits.softmax(dim=1), target, smooth=1e-10)


def test_networks_that_look_at_single_voxels_notice_no_cube() -> None:
    """Recovered crops, and crops from cubes, are then the crops: a cube in a wrong place would show."""
    method, batch = built("magicnet", 3, guidance="recovered"), batch_of(classes=3)
    output = method.step(batch, Progress(50, 100))
    logits = method.student.out_conv(batch.image)
    torch.testing.assert_close(output.guided[0], logits[2:])
    entropy, dice = cross_entropy(logits[:2], batch.label), plain_dice(logits[:2], batch.label)
    torch.testing.assert_close(output.losses["supervised"], (entropy + 3.0 * dice) / 4.0)


def test_the_official_order_shows_even_there() -> None:
    correct, official = (built("magicnet", crop=(8, 8, 8), cube_order=order) for order in ("correct", "official"))
    image = torch.randn(4, 1, 8, 8, 8)
    label = (image[:2, 0] > 0).to(torch.uint8)
    batch = Batch(image, label)
    losses = []
    for method in (correct, official):
        torch.manual_seed(1)
        losses.append(method.step(batch, Progress(5, 100)).losses)
    logits = correct.student.out_conv(image[:2])
    cubes = join_transposed(cut(logits, (2, 2, 2)), (2, 2, 2))
    moved = (plain_dice(cubes, label) - plain_dice(logits, label)) / 4.0
    assert float(moved.detach().abs()) > 1e-3
    torch.testing.assert_close(losses[1]["supervised"] - losses[0]["supervised"], moved)


@pytest.mark.parametrize(("step", "terms"), [(10, 3), (39, 3), (40, 4)])
def test_with_mact_the_dice_of_cubes_counts_after_the_ramp(step: int, terms: int) -> None:
    method, batch = built("magicnet", within="ramped", ramp_length=40, epoch_steps=1), batch_of()
    logits = method.student.out_conv(batch.image[:2])
    entropy, dice = cross_entropy(logits, batch.label), plain_dice(logits, batch.label)
    expected = (entropy + (terms - 1) * dice) / terms
    torch.testing.assert_close(method.step(batch, Progress(step, 100)).losses["supervised"], expected)


@pytest.mark.parametrize(("step", "blended"), [(7, False), (8, True)])
def test_pseudo_labels_are_blended_after_the_step_that_is_named(step: int, blended: bool) -> None:
    method = built("magicnet", blend_after=7, noise_std=0.0, consistency=2.0, ramp_length=0)
    method.teacher.net.out_conv.weight.data.mul_(-1.0)  # so that it matters who labels
    batch = batch_of()
    method.class_counts.copy_(torch.tensor([30, 10]))
    student, teacher = method.student.out_conv(batch.image[2:]), method.teacher.net.out_conv(batch.image[2:])
    mixed = blend(teacher, student, class_weights(method.class_counts))
    assert not torch.equal(class_map(mixed), class_map(teacher))
    expected = plain_dice(student, class_map(mixed if blended else teacher))
    torch.testing.assert_close(method.step(batch, Progress(step, 100)).losses["consistency"], 2.0 * expected)


def test_class_counts_are_those_of_the_steps_since_the_last_time() -> None:
    method, batch = built("magicnet", 3, noise_std=0.0), batch_of(classes=3)
    totals, counts = [torch.zeros(3, dtype=torch.int64)], []
    for step in range(22):
        method.teacher.net.out_conv.bias.data.copy_(torch.randn(3))
        labels = class_map(method.teacher.net.out_conv(batch.image[2:]))
        totals.append(totals[-1] + torch.bincount(labels.flatten().long(), minlength=3))
        method.step(batch, Progress(step, 22))
        method.after_update(Progress(step, 22))
        counts.append(method.class_counts.tolist())
    assert counts[:20] == [totals[1].tolist()] * 20
    assert counts[20:] == [(totals[21] - totals[1]).tolist()] * 2


@pytest.mark.parametrize(("cubes", "features", "places"), [(None, 2048, 27), ((2, 6, 1), 256 * 3 * 1 * 6, 12)])
def test_the_location_head_is_the_originals(cubes: Any, features: int, places: int) -> None:
    vnet, plugin = registry.load("net", "vnet"), registry.load("ssl", "magicnet")
    with torch.device("meta"):
        method = plugin(lambda: vnet().build(1, 9), 9, plugin.Config(cubes=cubes))
        method.fit_to((96, 96, 96))
    first, _, _, last = method.location
    assert (first.in_features, last.out_features) == (features, places)
    if cubes is None:
        assert sum(parameter.numel() for parameter in method.location.parameters()) == 8_511_515


def test_a_crop_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"4x4x4 .* 8x8x8"):
        built("magicnet", crop=(4, 4, 4))
    with pytest.raises(ConfigError, match=r"8x4x4 .* 12x4x4"):
        built("magicnet", cubes=(3, 1, 1))


def test_without_the_sides_of_the_crop_no_step_is_made() -> None:
    plugin = registry.load("ssl", "magicnet")
    with pytest.raises(UsageError, match="fit_to"):
        plugin(Spy, 2).step(batch_of(), Progress(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# pasting


@quick
@given(triples.map(lambda sides: tuple(4 * side for side in sides)), st.floats(0.1, 0.9), seeds)
def test_a_box_lies_in_its_crop(crop: Triple, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    box = box_sides(crop, share)
    corner = draw_corner(crop, box)
    outside = outside_box(crop, corner, box)
    assert int((~outside).sum()) == math.prod(box)
    for side, length, first in zip(crop, box, corner, strict=True):
        assert length == math.floor(side * share)
        assert 0 <= first < max(side - length, 1)


@quick
@given(triples, seeds)
def test_image_label_and_pseudo_label_are_pasted_alike(crop: Triple, seed: int) -> None:
    torch.manual_seed(seed)
    outside = torch.rand(crop) < 0.5
    image = paste(torch.zeros(2, 1, *crop), torch.ones(2, 1, *crop), outside)
    label = paste(torch.zeros(2, *crop, dtype=torch.uint8), torch.ones(2, *crop, dtype=torch.uint8), outside)
    assert label.dtype == torch.uint8
    assert torch.equal(image[:, 0] == 0, label == 0)
    kept = only(torch.zeros(2, *crop, dtype=torch.uint8), outside)
    assert torch.equal(kept == IGNORE, label == 1)


@quick
@given(triples, st.integers(2, 5), seeds)
def test_what_is_labelled_255_enters_no_loss(crop: Triple, classes: int, seed: int) -> None:
    """Neither the value nor the gradient of a loss knows of it; and without it the losses are the plain ones."""
    torch.manual_seed(seed)
    logits = torch.randn(2, classes, *crop, requires_grad=True)
    known = torch.rand(2, *crop) < 0.6
    target = torch.randint(classes, (2, *crop), dtype=torch.uint8).masked_fill(~known, IGNORE)
    for loss in (labelled_ce_dice, lambda z, y: labelled_dice_loss(z.softmax(dim=1), y)):
        (grad,) = torch.autograd.grad(loss(logits, target), logits)
        assert not grad.movedim(1, -1)[~known].any()
        other = torch.where(known.unsqueeze(1), logits, torch.randn_like(logits))
        torch.testing.assert_close(loss(other, target), loss(logits, target))


@pytest.mark.parametrize("name", ["magicnet", "bcp"])
def test_methods_do_not_look_at_labelled_voxels_without_a_label(name: str) -> None:
    method, batch = built(name), batch_of()
    gaps = torch.rand(batch.label.shape) < 0.3
    label = batch.label.masked_fill(gaps, IGNORE)
    image = batch.image.clone()
    image[:2, 0][gaps] += 5.0
    values = []
    for shown in (batch.image, image):
        torch.manual_seed(1)
        values.append(method.step(Batch(shown, label), SELF_TRAINING).losses)
    names = {"magicnet": ["supervised", "consistency"], "bcp": ["inward", "outward"]}[name]
    for loss in names:
        torch.testing.assert_close(values[0][loss], values[1][loss])


@pytest.mark.parametrize("name", ["magicnet", "bcp"])
@pytest.mark.parametrize("phase", [0, 1])
def test_crops_without_any_label_cost_nothing_but_stay_finite(name: str, phase: int) -> None:
    batch = batch_of(pseudo=True)
    empty = replace(batch, label=torch.full_like(batch.label, IGNORE))
    losses = built(name).step(empty, Progress(100 * phase + 50, 200, phase, 50, 100)).losses
    assert all(torch.isfinite(loss) for loss in losses.values())


def component_sizes(mask: Tensor, steps: set[tuple[int, ...]]) -> list[set[tuple[int, ...]]]:
    """Connected sets of voxels in scan order, by flooding."""
    left = [tuple(place) for place in mask.nonzero().tolist()]
    found = []
    while left:
        flood, queue = set(), [left[0]]
        while queue:
            place = queue.pop()
            if place in left:
                left.remove(place)
                flood.add(place)
                queue += [tuple(a + b for a, b in zip(place, step, strict=True)) for step in steps]
        found.append(flood)
    return found


@quick
@given(triples, st.sampled_from([6, 18, 26]), st.integers(2, 4), seeds)
def test_components_are_those_of_a_flood(crop: Triple, neighbours: Any, classes: int, seed: int) -> None:
    labels = torch.randint(classes, (1, *crop), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    farthest = {6: 1, 18: 2, 26: 3}[neighbours]
    steps = {s for s in itertools.product((-1, 0, 1), repeat=3) if 1 <= sum(map(abs, s)) <= farthest}
    expected = torch.zeros_like(labels)
    for value in range(1, classes):
        parts = component_sizes(labels[0] == value, steps)
        for place in max(parts, key=len, default=set()):  # the first on ties
            expected[0][place] = value
    assert torch.equal(largest_components(labels, neighbours), expected)


# ---------------------------------------------------------------------------------------------------------------------
# BCP


@pytest.mark.parametrize(("labelled", "unlabelled"), [(2, 2), (4, 4), (1, 1), (1, 4), (3, 2), (2, 5)])
def test_pasted_regions_of_image_and_pseudo_label_are_the_same(labelled: int, unlabelled: int) -> None:
    """Labelled crops are positive, unlabelled ones negative, so the sign says where a voxel comes from."""
    method, batch = built("bcp", 4), batch_of(labelled, unlabelled)
    image = torch.arange(1.0, labelled + unlabelled + 1).view(-1, 1, 1, 1, 1).expand_as(batch.image).clone()
    image[labelled:] *= -1
    numbers = torch.arange(unlabelled, dtype=torch.uint8).view(-1, 1, 1, 1) % 4
    pseudo = numbers.expand(unlabelled, *SIDES).contiguous()
    output = method.step(Batch(image, batch.label, pseudo), SELF_TRAINING)
    inward, outward = (shown for shown, _, _ in method.student.calls)
    shown, moved = torch.cat([inward, outward])[:, 0], output.guided_pseudo
    assert torch.equal(moved != IGNORE, shown < 0)
    assert torch.equal(output.guided[0], torch.cat([method.student.out_conv(inward), method.student.out_conv(outward)]))
    own = (-shown[shown < 0]).long() - labelled - 1
    assert torch.equal(moved[shown < 0].long(), own % 4)  # each voxel brings its own crop's pseudo-label
    box = math.prod(box_sides(SIDES, method.config.box))
    pairs = max(-(-labelled // 2), -(-unlabelled // 2))
    assert int((inward < 0).sum()) == pairs * box == int((outward > 0).sum())
    assert torch.equal(inward[0] < 0, outward[0] > 0)  # one box for both ways
    assert set(shown.flatten().tolist()) == set(image.flatten().tolist())  # no crop is left out


def test_the_losses_of_mixed_crops_against_their_formula() -> None:
    method, batch = built("bcp", 3, unlabelled_weight=0.25), batch_of(4, 4, classes=3)
    output = method.step(batch, SELF_TRAINING)
    (inward, _, _), (outward, _, _) = method.student.calls
    outside = (inward == batch.image[:2])[0, 0]
    for name, shown, labels, crops, region in (
        ("inward", inward, batch.label[:2], batch.image[4:6], outside),
        ("outward", outward, batch.label[2:], batch.image[6:], ~outside),
    ):
        own = largest_components(class_map(method.teacher.out_conv(crops)))
        logits = method.student.out_conv(shown)
        expected = labelled_ce_dice(logits, only(labels, region))
        expected = expected + 0.25 * labelled_ce_dice(logits, only(own, ~region))
        torch.testing.assert_close(output.losses[name], expected)
    assert not output.masks
    assert not output.guided


def test_where_guidance_replaces_the_teacher_nobody_asks_it() -> None:
    method, batch = built("bcp", guidance="replaces"), batch_of(pseudo=True)
    output = method.step(batch, SELF_TRAINING)
    assert not method.teacher.calls
    assert method.teacher.out_conv.weight.requires_grad is False
    assert torch.equal(output.masks["inward"], ~output.masks["outward"])
    kept = torch.cat([output.masks["inward"], output.masks["outward"]])[:, 0]
    assert torch.equal(output.guided_pseudo == IGNORE, kept)


@pytest.mark.parametrize(("labelled", "pairs"), [(4, [(0, 2), (1, 3)]), (3, [(0, 1), (1, 2)]), (1, [(0, 0)])])
def test_pre_training_pastes_labelled_crops_in_each_other(labelled: int, pairs: list[tuple[int, int]]) -> None:
    method, batch = built("bcp"), batch_of(labelled, 2)
    loss = method.step(batch, Progress(10, 200, 0, 10, 100)).losses["pre-training"]
    ((shown, training, _),) = method.student.calls
    assert training
    assert len(shown) == len(pairs)
    targets = []
    for crop, (around, within) in zip(shown, pairs, strict=True):
        ours = crop == batch.image[around]
        assert bool((ours | (crop == batch.image[within])).all())
        targets.append(torch.where(ours[0], batch.label[around], batch.label[within]))
    torch.testing.assert_close(loss, labelled_ce_dice(method.student.out_conv(shown), torch.stack(targets)))


def test_guidance_works_in_pre_training_too() -> None:
    method, batch = built("bcp"), batch_of(pseudo=True)
    output = method.step(batch, Progress(10, 200, 0, 10, 100))
    assert torch.equal(output.guided[0], method.student.out_conv(batch.image[2:]))
    assert output.guided_pseudo is None


def test_the_teacher_begins_as_the_student_and_follows_at_a_constant_pace() -> None:
    method, batch = built("bcp", decay=0.9), batch_of()
    before = method.teacher.out_conv.weight.clone()
    method.step(batch, Progress(0, 10, 0, 0, 5))
    method.after_update(Progress(0, 10, 0, 0, 5))
    assert torch.equal(method.teacher.out_conv.weight, before)
    for phase_step in range(2):
        progress = Progress(5 + phase_step, 10, 1, phase_step, 5)
        method.step(batch, progress)
        alike = torch.equal(method.teacher.out_conv.weight, method.student.out_conv.weight)
        assert alike == (phase_step == 0)
        old = method.teacher.out_conv.weight.clone()
        method.student.out_conv.weight.data.add_(1.0)
        method.after_update(progress)
        expected = 0.9 * old + 0.1 * method.student.out_conv.weight
        torch.testing.assert_close(method.teacher.out_conv.weight, expected)


def test_a_run_is_shared_out_as_in_the_original() -> None:
    first, second = built("bcp").phases()
    assert first.share / second.share == pytest.approx(2000 / 15000)


# ---------------------------------------------------------------------------------------------------------------------
# the laws


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize(("name", "options"), [
    ("magicnet", {"blend_after": 0, "cube_order": "official"}),
    ("magicnet", {"blend_after": 0, "temperature": 2.0, "cubes": (1, 2, 1), "location_width": 8}),
    ("magicnet", {"blend_after": None, "within": "ramped", "ramp_length": 20, "guidance": "recovered"}),
    ("bcp", {}),
    ("bcp", {"guidance": "replaces", "pretraining": 15.0}),
    ("bcp", {"neighbours": 6, "box": 0.5}),
])  # fmt: skip
def test_other_forms(name: str, options: dict[str, Any], num_classes: int) -> None:
    method = registry.load("ssl", name)
    check_ssl(method, method.Config(**options), num_classes=num_classes)
