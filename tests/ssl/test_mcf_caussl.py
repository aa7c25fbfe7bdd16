"""MCF, CauSSL and MC-Net: which network learns from which, when filters are kept apart, and against plain spellings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.contracts import Batch, Progress
from cfrbench.decoders import SharedEncoder, mixed_then_raised
from cfrbench.testing import check_ssl
from cfrbench_segmenter.resvnet import ResVNet
from cfrbench_ssl.caussl import CauSSL
from cfrbench_ssl.mc_net import MCNet
from cfrbench_ssl.mcf import MCF
from tests.golden.ssl_cases import Stored, StoredBackbone, progress_at
from tests.ssl.spy import SIDES, L, Spy, U, crops, halfway

FULL = {"consistency": 1.0, "ramp_length": 0}


def make(method: Any, num_classes: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    return method(lambda: Spy(num_classes), num_classes, method.Config(**options)).train()


def vnets(width: int = 2, depth: int = 2, name: str = "vnet") -> Any:
    segmenter = registry.load("net", name)
    return lambda: segmenter(segmenter.Config(width=width, depth=depth)).build(1, 2)


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (MCF, {}),
        (MCF, {"initialisation": "original", "dropout": 0.0, "temperature": 1.0}),
        (CauSSL, {"search_steps": 5}),
        (CauSSL, {"search_steps": 5, "penalised": "first", "every": 2}),
        (CauSSL, {"search_steps": 5, "form": "cps"}),
        (CauSSL, {"search_steps": 5, "form": "cps", "tested": "second", "begin": 1, "begin_cross": 0}),
        (MCNet, {}),
        (MCNet, {"decoders": 3, "detach_target": True}),
    ],
)
def test_laws(method: Any, options: dict[str, Any], num_classes: int) -> None:
    check_ssl(method, method.Config(**options), num_classes=num_classes)


# ---------------------------------------------------------------------------------------------------------------------
# MCF


def stored_mcf(batch: Batch, first: Tensor, second: Tensor, **options: Any) -> Any:
    method = MCF(lambda: StoredBackbone(first), first.shape[1], MCF.Config(**options))
    method.both.networks[1] = Stored(second)
    return method.train()


def logits_of(batch: Batch, sure: float, classes: int, seed: int) -> Tensor:
    """Random logits that favour the labels by ``sure``."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(batch.image), classes, *SIDES, generator=draw)
    truth = nn.functional.one_hot(batch.label.long(), classes).movedim(-1, 1)
    logits[:L] += sure * truth
    return logits


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("better", [0, 1])
def test_mcf_gives_the_better_network_nothing_extra(better: int, classes: int) -> None:
    batch = crops(classes)
    both = [logits_of(batch, 3.0 if index == better else 0.0, classes, seed=index) for index in range(2)]
    method = stored_mcf(batch, *both, **FULL)
    loss = method.step(batch, halfway()).losses["consistency"]
    parameters = [method.both.networks[0].out_conv.logits, method.both.networks[1].logits]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert gradients[better] is None
    worse = gradients[1 - better]
    assert worse is not None
    assert not worse[:L].any()
    assert worse[L:].any()
    good, bad = both[better][L:].softmax(1), both[1 - better][L:].softmax(1)
    target = good**10 / (good**10).sum(1, keepdim=True)
    torch.testing.assert_close(loss.detach(), (bad - target).square().mean())


def test_mcf_calls_the_second_network_better_in_a_tie() -> None:
    batch = crops()
    logits = logits_of(batch, 1.0, 2, seed=0)
    method = stored_mcf(batch, logits, logits.clone(), temperature=0.5)
    loss = method.step(batch, halfway()).losses["consistency"]
    (gradient,) = torch.autograd.grad(loss, [method.both.networks[0].out_conv.logits])
    assert gradient.any()


@pytest.mark.parametrize("classes", [2, 3])
def test_mcf_rectifies_the_labelled_voxels_where_the_networks_differ(classes: int) -> None:
    batch = crops(classes)
    batch.label[0, 0] = 255
    first, second = (torch.randn(L + U, classes, *SIDES, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    method = stored_mcf(batch, first, second, rectification=1.0)
    loss, expected = method.step(batch, halfway()).losses["rectification"], 0.0
    differ = (first.argmax(1) != second.argmax(1))[:L] & (batch.label != 255)
    for logits in (first, second):
        squares = []
        for crop, x, y, z in differ.nonzero().tolist():
            p, name = logits[crop, :, x, y, z].softmax(0), int(batch.label[crop, x, y, z])
            squares += [(float(p[c]) - float(c == name)) ** 2 for c in range(classes)]
        expected += sum(squares) / len(squares)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, [method.both.networks[1].logits])
    assert torch.equal(gradient[:L].any(1), differ)
    assert not gradient[L:].any()


def test_mcf_without_a_difference_is_zero_not_nan() -> None:
    batch = crops()
    logits = logits_of(batch, 1.0, 2, seed=0)
    output = stored_mcf(batch, logits, logits.clone()).step(batch, halfway())
    assert float(output.losses["rectification"].detach()) == 0.0


@pytest.mark.parametrize(("width", "depth"), [(2, 2), (8, 3)])
def test_the_second_network_of_mcf_has_the_size_of_the_first(width: int, depth: int) -> None:
    method = MCF(vnets(width, depth), 2)
    first, second = method.both.networks
    assert isinstance(second, ResVNet)
    assert second.widths == first.widths


def test_mcf_tests_the_mean_of_both_networks() -> None:
    method = MCF(vnets(), 2).eval()
    image = torch.randn(2, 1, 8, 8, 8)
    with torch.no_grad():
        both = [network(image).softmax(1) for network in method.both.networks]
        torch.testing.assert_close(method.predictor()(image).softmax(1), (both[0] + both[1]) / 2)


def test_the_original_mcf_starts_kaiming_normal() -> None:
    torch.manual_seed(0)
    method = MCF(vnets(8, 2), 2, MCF.Config(initialisation="original"))
    weight = next(p for p in method.both.networks[0].parameters() if p.shape[1:2] == (32,) and p.shape[-1:] == (3,))
    assert float(weight.detach().std()) == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# CauSSL


def measured(method: Any) -> list[Tensor]:
    return [mixture.dependence(own, rows) for mixture, own, rows in method._measured(method._filters())]


@pytest.mark.parametrize("form", ["mc", "cps"])
def test_learning_the_term_makes_filters_independent(form: str) -> None:
    torch.manual_seed(0)
    method = CauSSL(vnets(), 2, CauSSL.Config(form=form, search_steps=60))
    batch = Batch(torch.randn(4, 1, 8, 8, 8), torch.randint(2, (2, 8, 8, 8), dtype=torch.uint8))
    method.train().step(batch, progress_at(60, 6000) if form == "mc" else progress_at(540, 6000))
    before = [float(value.detach()) for value in measured(method)]
    optimiser = torch.optim.SGD(method.parameters(), lr=0.1)
    torch.stack(measured(method)).sum().backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    assert all(float(after.detach()) < value for after, value in zip(measured(method), before, strict=True))


#: form, steps of a run of 6000, whether A is sought there, whether the terms that begin later are there
RHYTHM = [
    ("mc", 0, False, False), ("mc", 40, False, False), ("mc", 59, False, False), ("mc", 60, True, True),
    ("mc", 61, False, True), ("mc", 120, True, True),
    ("cps", 400, False, False), ("cps", 480, False, False), ("cps", 539, False, False), ("cps", 540, True, True),
    ("cps", 541, False, True),
]  # fmt: skip


@pytest.mark.parametrize("config", ["default", "original"])
@pytest.mark.parametrize(("form", "step", "sought", "active"), RHYTHM)
def test_the_rhythm_of_the_official_scripts(form: str, step: int, sought: bool, active: bool, config: str) -> None:
    named = CauSSL.configs["original-cps" if form == "cps" else "original"]
    method = make(CauSSL, search_steps=1, **({"form": form} if config == "default" else named))
    losses = method.step(crops(), progress_at(step, 6000)).losses
    assert [int(mixture.updates) for mixture in method.mixtures] == [int(sought)] * len(method.mixtures)
    assert ("independence" in losses) == active
    assert ("pseudo-supervision" in losses) == (form == "cps" and step > 400)


def test_a_shorter_run_keeps_the_rhythm() -> None:
    method = make(CauSSL, search_steps=1)
    sought = []
    for step in range(40):
        before = int(method.mixtures[0].updates)
        losses = method.step(crops(), progress_at(step, 900)).losses
        sought += [step] if int(method.mixtures[0].updates) > before else []
        assert ("independence" in losses) == (step >= 9)
    assert sought == [9, 18, 27, 36]


def test_of_batches_that_make_one_update_only_the_first_begins_with_a_search() -> None:
    method = make(CauSSL, search_steps=1)
    for part in (0, 1):
        method.step(crops(), Progress(60, 6000, part=part))
    assert int(method.mixtures[0].updates) == 1


def test_caussl_has_the_parameters_of_the_official_network_that_are_read() -> None:
    """The official count of 23,604,966 holds two bottleneck blocks that nothing reads."""
    method = CauSSL(vnets(16, 4), 2)
    unread = 2 * 3 * (256 * 256 * 27 + 256 + 2 * 256)
    assert sum(p.numel() for p in method.parameters()) == 23_604_966 - unread
    assert [len(layers) for layers in method._filters()] == [10, 10, 10]


def test_the_two_networks_have_the_official_number_of_coefficients() -> None:
    method = CauSSL(vnets(16, 4), 2, CauSSL.Config(form="cps"))
    assert [len(layers) for layers in method._filters()] == [30, 30]
    assert [mixture.values.numel() for mixture in method.mixtures] == [498_180] * 2


def test_caussl_learns_labels_and_the_other_decoders() -> None:
    batch, method = crops(3), make(CauSSL, 3, **FULL)
    output = method.step(batch, halfway())
    logits = [values.detach() for values in method.shared(batch.image)]
    for guided, values in zip(output.guided, logits, strict=True):
        torch.testing.assert_close(guided.detach(), values[L:])
    softmaxes = [values[L:].softmax(1) for values in logits]
    sharp = [p**2 / (p**2).sum(1, keepdim=True) for p in softmaxes]
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    expected = sum((softmaxes[i] - sharp[j]).square().mean() for i, j in pairs)
    torch.testing.assert_close(output.losses["consistency"].detach(), expected)
    supervised = 0.0
    for values in logits:
        p, terms = values[:L].softmax(1), []
        for c in (1, 2):
            mask = (batch.label == c).float()
            terms.append(1 - (2 * (p[:, c] * mask).sum() + 1e-5) / (p[:, c].square().sum() + mask.sum() + 1e-5))
        entropy = nn.functional.cross_entropy(values[:L], batch.label.long())
        supervised += float(0.5 * (entropy + sum(terms) / 2))
    assert float(output.losses["supervised"].detach()) == pytest.approx(supervised, rel=1e-5)


def test_caussl_of_two_networks_learns_the_other_ones_labels() -> None:
    batch, method = crops(3), make(CauSSL, 3, form="cps", **FULL)
    first, second = (network(batch.image)[L:].detach() for network in method.networks)
    crossed = nn.functional.cross_entropy(first, second.argmax(1)) + nn.functional.cross_entropy(
        second, first.argmax(1)
    )
    output = method.step(batch, halfway())
    torch.testing.assert_close(output.losses["pseudo-supervision"].detach(), 0.3 * crossed)
    assert method.predictor() is method.networks[0]
    other = make(CauSSL, form="cps", tested="second")
    assert other.predictor() is other.networks[1]


# ---------------------------------------------------------------------------------------------------------------------
# decoders


@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
def test_a_step_up_mixes_channels_and_doubles_sides(mode: Any) -> None:
    torch.manual_seed(0)
    step_up, x = mixed_then_raised(mode)(3, 2), torch.randn(1, 3, 2, 3, 4)
    mixed = torch.einsum("oi,bixyz->boxyz", step_up[0].weight[..., 0, 0, 0], x) + step_up[0].bias.view(-1, 1, 1, 1)
    raised = step_up(x)
    assert raised.shape == (1, 2, 4, 6, 8)
    if mode == "nearest":
        torch.testing.assert_close(
            raised, mixed.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
        )
    else:  # with corners aligned, corners keep their values
        torch.testing.assert_close(raised[..., ::3, ::5, ::7], mixed[..., ::1, ::2, ::3])


@pytest.mark.parametrize(("name", "changed"), [("vnet", True), ("unet3d", False)])
def test_decoders_share_the_encoder_and_nothing_else(name: str, changed: bool) -> None:
    shared = SharedEncoder(vnets(name=name), "x", [mixed_then_raised("nearest")] * 2).train()
    image = torch.randn(2, 1, 8, 8, 8)
    first, *others = shared(image)
    assert not any(torch.equal(first, other) for other in others)
    upward = [layer for layer in shared.others.modules() if isinstance(layer, nn.Upsample)]
    assert bool(upward) == changed
    assert not [layer for layer in shared.others.modules() if isinstance(layer, nn.ConvTranspose3d)]
    for filters in zip(*shared.filters(), strict=True):
        assert len({weight.data_ptr() for weight in filters}) == 3
        assert len({weight.shape for weight in filters}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# MC-Net


@pytest.mark.parametrize("decoders", [2, 3])
def test_mcnet_agrees_on_all_crops(decoders: int) -> None:
    batch, method = crops(), make(MCNet, decoders=decoders, **FULL)
    output = method.step(batch, halfway())
    softmaxes = [logits.detach().softmax(1) for logits in method.shared(batch.image)]
    assert len(softmaxes) == len(output.guided) == decoders
    sharp = [p**10 / (p**10 + (1 - p) ** 10) for p in softmaxes]  # the official formula
    pairs = [(i, j) for i in range(decoders) for j in range(decoders) if i != j]
    expected = sum((softmaxes[i] - sharp[j]).square().mean() for i, j in pairs)
    torch.testing.assert_close(output.losses["consistency"].detach(), expected)
    mask, dices = (batch.label == 1).float(), []
    for p in softmaxes:
        score = p[:L, 1]
        dices.append(1 - (2 * (score * mask).sum() + 1e-10) / (score.sum() + mask.sum() + 1e-10))
    torch.testing.assert_close(output.losses["dice"].detach(), 0.5 * sum(dices))


@pytest.mark.parametrize("detached", [False, True])
def test_what_is_learnt_from_gets_a_gradient_unless_detached(detached: bool) -> None:
    batch, method = crops(), make(MCNet, detach_target=detached, **FULL)
    own = method.shared.net.out_conv.weight
    loss = method.step(batch, halfway()).losses["consistency"]
    (gradient,) = torch.autograd.grad(loss, [own])
    with torch.no_grad():
        logits = method.shared(batch.image)
        target = (10 * logits[1]).softmax(1)
    (alone,) = torch.autograd.grad((method.shared(batch.image)[0].softmax(1) - target).square().mean(), [own])
    assert torch.allclose(gradient, alone, rtol=1e-4, atol=1e-7) == detached


def test_the_ramp_of_mcnet_takes_its_share_of_any_run() -> None:
    config, original = MCNet.Config(), MCNet.Config(**MCNet.configs["original"])
    for step in (0, 750, 3000, 6000, 14999):  # where both are at the beginning of a ramp epoch, or past the last one
        assert config.weight(progress_at(step, 15000)) == original.weight(progress_at(step, 15000))
    assert config.weight(progress_at(400, 1000)) == 1.0
