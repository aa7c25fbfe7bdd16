"""UA-MT, ICT, CPS, CCT, DTC and URPC: which passes they make, and their losses against plain spellings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.config import Settings, override, validate
from cfrbench.contracts import Batch, Progress
from cfrbench.distance_maps import signed_distance_maps
from cfrbench.errors import ConfigError
from cfrbench.losses import ce_dice, class_map, softmax_mse
from tests.ssl.spy import SIDES, C, L, U, crops, halfway, make

HEADED = ("cct", "dtc", "urpc")
FULL = {"consistency": 1.0, "ramp_length": 0}


@pytest.fixture
def batch() -> Batch:
    return crops()


def shown(network: Any) -> list[Tensor]:
    return [image for image, _, _ in network.calls]


# ---------------------------------------------------------------------------------------------------------------------
# UA-MT


@pytest.mark.parametrize(("which", "first"), [("unlabelled", L), ("all", 0)])
def test_uamt_asks_the_teacher_once_for_the_target_and_in_pairs_for_the_mask(
    batch: Batch, which: str, first: int
) -> None:
    method = make("ua-mt", crops=which, passes=6)
    output = method.step(batch, halfway())
    (seen,) = shown(method.student)
    assert torch.equal(seen, batch.image)
    target, *passes = shown(method.teacher.net)
    count = L + U - first
    assert len(target) == count
    assert [len(images) for images in passes] == [2 * count] * 3
    assert not torch.equal(passes[0][:count], passes[0][count:]), "noise is fresh for each half"
    assert output.masks["consistency"].shape == (count, 1, *SIDES)


def test_uamt_averages_over_the_voxels_where_the_teacher_is_sure(batch: Batch) -> None:
    method = make("ua-mt", noise_std=0.0, threshold_start=0.9, threshold_stop=0.9, **FULL)
    method.teacher.net.conv.weight.data.mul_(3.0)
    with torch.no_grad():
        student, teacher = method.student.conv(batch.image[L:]), method.teacher.net.conv(batch.image[L:])
    output = method.step(batch, halfway())
    target = teacher.softmax(1)  # without noise and dropout all passes are alike
    entropy = -(target * (target + 1e-6).log()).sum(1, keepdim=True) / math.log(C)
    assert torch.equal(output.masks["consistency"], entropy < 0.9)
    kept = (entropy < 0.9).expand_as(target)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(output.losses["consistency"].detach(), softmax_mse(student, teacher)[kept].mean())


def test_uamt_refuses_an_odd_number_of_passes() -> None:
    with pytest.raises(ConfigError, match="passes"):
        validate(registry.load("ssl", "ua-mt").Config, {"passes": 7}, "the options of ssl.ua-mt")


# ---------------------------------------------------------------------------------------------------------------------
# ICT


@pytest.mark.parametrize(("unlabelled", "pairs"), [(2, 1), (3, 1), (4, 2)])
def test_ict_mixes_one_half_with_the_other(unlabelled: int, pairs: int) -> None:
    batch = crops(unlabelled=unlabelled)
    method = make("ict", **FULL)
    output = method.step(batch, halfway())
    (mixed,), teacher = shown(method.student), shown(method.teacher.net)
    first, second = batch.image[L : L + pairs], batch.image[L + pairs : L + 2 * pairs]
    assert torch.equal(mixed[:L], batch.image[:L])
    assert all(map(torch.equal, teacher, (first, second))), "two passes, without noise"
    share = ((mixed[L:] - first) / (second - first)).flatten(1).median(1).values.view(-1, 1, 1, 1, 1)
    assert ((share >= 0) & (share <= 1)).all()
    torch.testing.assert_close(mixed[L:], (1 - share) * first + share * second, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        one, two = (method.teacher.net.conv(half).softmax(1) for half in (first, second))
        distance = (method.student.conv(mixed[L:]).softmax(1) - (1 - share) * one - share * two).square().mean()
    torch.testing.assert_close(output.losses["consistency"].detach(), distance, rtol=1e-3, atol=1e-6)


def test_ict_looks_at_unmixed_crops_for_guidance_only(batch: Batch) -> None:
    pseudo = torch.zeros(U, *SIDES, dtype=torch.uint8)
    outputs = []
    for given in (batch, replace(batch, pseudo=pseudo)):
        method = make("ict")
        torch.manual_seed(1)
        outputs.append((method, method.step(given, halfway())))
    (alone, plain), (guided, twin) = outputs
    assert len(alone.student.calls) == 1
    assert plain.guided == ()
    assert torch.equal(shown(guided.student)[1], batch.image[L:])
    torch.testing.assert_close(twin.guided[0], guided.student.conv(batch.image[L:]))
    assert all(torch.equal(plain.losses[name], twin.losses[name]) for name in plain.losses)


def test_ict_shares_are_mostly_near_the_ends() -> None:
    method = make("ict")
    torch.manual_seed(0)
    shares = method._shares(2000)
    assert 0.35 < shares.mean() < 0.65
    assert ((shares < 0.1) | (shares > 0.9)).float().mean() > 0.6


def test_ict_needs_two_unlabelled_crops() -> None:
    with pytest.raises(ConfigError, match=r"training\.unlabelled_batch"):
        make("ict").step(crops(unlabelled=1), halfway())


# ---------------------------------------------------------------------------------------------------------------------
# CPS


@pytest.mark.parametrize(("which", "first"), [("unlabelled", L), ("all", 0)])
def test_cps_networks_differ_and_label_for_each_other(batch: Batch, which: str, first: int) -> None:
    method = make("cps", crops=which, **FULL)
    assert not torch.equal(method.first.conv.weight, method.second.conv.weight)
    output = method.step(batch, halfway())
    assert all(torch.equal(images[0], batch.image) for images in map(shown, (method.first, method.second)))
    one, two = (network.conv(batch.image) for network in (method.first, method.second))
    crossed = sum(
        nn.functional.cross_entropy(own[first:], class_map(other[first:].detach()).long())
        for own, other in ((one, two), (two, one))
    )
    torch.testing.assert_close(output.losses["pseudo-supervision"], crossed)
    supervised = ce_dice(one[:L], batch.label) + ce_dice(two[:L], batch.label)
    torch.testing.assert_close(output.losses["supervised"], supervised)
    assert [tuple(logits.shape) for logits in output.guided] == [(U, C, *SIDES)] * 2


def test_cps_starts_as_officially_if_asked_to() -> None:
    vnet = registry.load("net", "vnet")
    plugin = registry.load("ssl", "cps")
    torch.manual_seed(0)
    net = vnet(vnet.Config(width=8, depth=2))
    method = plugin(lambda: net.build(1, C), C, plugin.Config(initialisation="original"))
    fan = 32 * 27  # of a convolution from 32 to 32 channels, in and out
    for network, variance in ((method.first, 2 / fan), (method.second, 2 / (fan + fan))):
        weight = network.block_three.conv[3].weight.detach()
        assert weight.shape[:2] == (32, 32)
        assert float(weight.var()) == pytest.approx(variance, rel=0.05)


def test_cps_can_test_its_second_network() -> None:
    assert make("cps").predictor() is not make("cps").second
    second = make("cps", tested="second")
    assert second.predictor() is second.second


# ---------------------------------------------------------------------------------------------------------------------
# CCT, DTC, URPC: heads inside the network


@pytest.mark.parametrize("name", HEADED)
def test_a_network_that_cannot_be_taken_apart_is_refused(name: str) -> None:
    plugin = registry.load("ssl", name)
    with pytest.raises(ConfigError, match=f"'{name}'.*'Conv3d'"):
        plugin(lambda: nn.Conv3d(1, C, kernel_size=1), C)


def vnet_method(name: str, depth: int = 2, **options: Any) -> Any:
    vnet = registry.load("net", "vnet")
    segmenter = vnet(vnet.Config(width=2, depth=depth))
    plugin = registry.load("ssl", name)
    torch.manual_seed(0)
    return plugin(lambda: segmenter.build(1, C), C, plugin.Config(**options)).train()


def scalars(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_cct_decoders_have_weights_of_their_own_and_no_encoder() -> None:
    separate, shared = vnet_method("cct"), vnet_method("cct", decoders="shared")
    assert scalars(shared) == scalars(shared.net) == scalars(separate.net)
    assert len(separate.auxiliary) == 3
    assert 0 < scalars(separate.auxiliary[0]) < scalars(separate.net)
    assert not torch.equal(separate.auxiliary[0].out_conv.weight, separate.auxiliary[1].out_conv.weight)


@pytest.mark.parametrize("perturbations", ["ssl4mis", "cpcl"])
@pytest.mark.parametrize("decoders", ["separate", "shared"])
def test_cct_reads_the_encoder_once(batch: Batch, decoders: str, perturbations: str) -> None:
    method = make("cct", decoders=decoders, perturbations=perturbations, **FULL)
    output = method.step(batch, halfway())
    assert len(method.net.calls) == 1
    torch.testing.assert_close(output.guided[0], method.net.conv(batch.image[L:]))
    assert float(output.losses["consistency"].detach()) > 0


def test_cct_as_the_paper_teaches_it(batch: Batch) -> None:
    method = make("cct", supervised_decoders="main", detach_target=True, **FULL)
    output = method.step(batch, halfway())
    torch.testing.assert_close(output.losses["supervised"], ce_dice(method.net.conv(batch.image[:L]), batch.label))
    output.losses["consistency"].backward()
    assert method.net.conv.weight.grad is None
    assert all(decoder.conv.weight.grad is not None for decoder in method.auxiliary)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_dtc_with_a_softmax_counts_every_foreground_class(num_classes: int) -> None:
    batch = crops(num_classes)
    method = make("dtc", num_classes, form="softmax", ce_weight=2.0, **FULL)
    output = method.step(batch, halfway())
    logits, level_set = method.net.conv(batch.image), method.level_set(batch.image)
    assert level_set.shape[1] == num_classes - 1
    dice, distance, agreement = [], [], []
    for index in range(1, num_classes):
        p, truth, h = logits.softmax(1)[:, index], batch.label == index, level_set[:, index - 1]
        phi = signed_distance_maps(truth, absent=1.0)
        dice.append(1 - (2 * (p[:L] * truth).sum() + 1e-5) / (p[:L].square().sum() + truth.sum() + 1e-5))
        distance.append((h[:L] - phi).square().mean())
        agreement.append((torch.sigmoid(-1500 * h) - p).square().mean())
    cross_entropy = 2.0 * nn.functional.cross_entropy(logits[:L], batch.label.long())
    expected = {"dice": sum(dice) / len(dice), "level-set": 0.3 * sum(distance) / len(dice),
                "consistency": sum(agreement) / len(dice), "cross-entropy": cross_entropy}  # fmt: skip
    assert output.losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.losses[name], value)


def test_dtc_with_one_sigmoid_is_the_softmax_of_two_classes(batch: Batch) -> None:
    single, double = make("dtc"), make("dtc", form="softmax", absent="zero")
    weight, bias = double.net.conv.weight.data, double.net.conv.bias.data
    single.net.conv[0].weight.data = weight[1:] - weight[:1]
    single.net.conv[0].bias.data = bias[1:] - bias[:1]
    single.level_set.load_state_dict(double.level_set.state_dict())
    one, two = (method.step(batch, halfway()) for method in (single, double))
    for name in one.losses:
        torch.testing.assert_close(one.losses[name], two.losses[name])
    torch.testing.assert_close(one.guided[0].softmax(1), two.guided[0].softmax(1))
    assert single.predictor()(batch.image).shape == (L + U, 2, *SIDES)


def test_dtc_has_one_sigmoid_for_two_classes_only() -> None:
    with pytest.raises(ConfigError, match=r"ssl\.dtc\.form"):
        make("dtc", 3, form="sigmoid")
    assert isinstance(make("dtc", 3).net.conv, nn.Conv3d)
    assert not isinstance(make("dtc", 2).net.conv, nn.Conv3d)


@pytest.mark.parametrize(("num_classes", "absent", "value"), [(2, "auto", 0), (3, "auto", 1), (2, "outside", 1)])
def test_dtc_says_what_the_map_of_an_absent_class_is(num_classes: int, absent: str, value: float) -> None:
    maps = make("dtc", num_classes, absent=absent)._distances(torch.zeros(L, *SIDES, dtype=torch.uint8))
    assert torch.equal(maps, torch.full((L, num_classes - 1, *SIDES), float(value)))


def plain_urpc(heads: list[Tensor]) -> Tensor:
    probabilities = [head.double().softmax(1) for head in heads]
    mean = sum(probabilities) / len(heads)
    assert isinstance(mean, Tensor)
    terms = []
    for p in probabilities:
        divergence = (mean * (mean.log() - p.log())).sum(1)
        weight = (-divergence).exp().unsqueeze(1)
        terms.append(((mean - p) ** 2 * weight).mean() / weight.mean() + divergence.mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("num_classes", [2, 6])
def test_urpc_is_its_formula(num_classes: int) -> None:
    batch = crops(num_classes)
    method = make("urpc", num_classes, **FULL)
    output = method.step(batch, halfway())
    outputs = method.outputs(batch.image)
    assert len(outputs) == 2, "the spy has two levels"
    expected = plain_urpc([logits[L:] for logits in outputs])
    torch.testing.assert_close(output.losses["consistency"].double(), expected, rtol=1e-5, atol=1e-7)
    supervised = sum(ce_dice(logits[:L], batch.label) for logits in outputs) / 2
    torch.testing.assert_close(output.losses["supervised"], supervised)


def test_urpc_stays_finite_where_probabilities_underflow(batch: Batch) -> None:
    method = make("urpc", **FULL)
    method.net.conv.weight.data.mul_(1e4)
    method.heads[0].weight.data.mul_(-1e4)
    output = method.step(batch, halfway())
    output.losses["consistency"].backward()
    assert torch.isfinite(output.losses["consistency"])
    assert torch.isfinite(method.net.conv.weight.grad).all()


@pytest.mark.parametrize(("depth", "scales", "count"), [(4, 4, 4), (4, 2, 2), (3, 4, 3)])
def test_urpc_reads_as_many_scales_as_there_are(depth: int, scales: int, count: int) -> None:
    method = vnet_method("urpc", depth=depth, scales=scales).eval()
    image = torch.randn(1, 1, 16, 32, 16)
    outputs = method.outputs(image)
    assert [tuple(logits.shape) for logits in outputs] == [(1, C, 16, 32, 16)] * count
    assert torch.equal(outputs[0], method.predictor()(image))
    for level, logits in enumerate(outputs):  # voxels are repeated
        block = 1 << level
        repeated = logits[..., ::block, ::block, ::block].repeat_interleave(block, -1)
        assert torch.equal(logits, repeated.repeat_interleave(block, -2).repeat_interleave(block, -3))


def test_urpc_needs_two_levels() -> None:
    with pytest.raises(ConfigError, match=r"'urpc'.*net\.vnet\.depth"):
        vnet_method("urpc", depth=1)


# ---------------------------------------------------------------------------------------------------------------------
# all of them


@pytest.mark.parametrize("name", registry.names("ssl"))
@pytest.mark.parametrize("num_classes", [2, 5, 14])
def test_every_method_trains_on_any_number_of_classes_in_half_precision(name: str, num_classes: int) -> None:
    method, batch = make(name, num_classes), crops(num_classes, unlabelled=2)
    batch = replace(batch, pseudo=torch.zeros(2, *SIDES, dtype=torch.uint8))
    with torch.autocast("cpu", torch.bfloat16):
        output = method.step(batch, Progress(50, 200, 0, 50, 100))
    total = torch.stack(list(output.losses.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", registry.names("ssl"))
def test_named_configs_are_options_of_their_method(name: str) -> None:
    plugin = registry.load("ssl", name)
    for title, values in plugin.configs.items():
        options = override(Settings(), {f"ssl.{name}.{key}": value for key, value in values.items()}).options
        config = validate(plugin.Config, options[f"ssl.{name}"], title)
        assert config != plugin.Config(), f"'{title}' is the default"
        assert set(plugin.formulas) >= set(make(name).step(crops(), halfway()).losses)
