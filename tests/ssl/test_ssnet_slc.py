"""SS-Net and SLC-Net: the passes they make, their losses against plain spellings, and the laws in every form."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench import registry
from cfrbench.adversarial import adversarial_direction
from cfrbench.contracts import Progress, SSLMethod
from cfrbench.errors import ConfigError
from cfrbench.losses import block_dice_loss, dice_loss, linear_dice_loss, soft_dice_loss
from cfrbench.schedules import sigmoid_rampup
from cfrbench.testing import check_ssl
from cfrbench.testing._lab import Lab, TinyNet
from cfrbench_ssl.slc_net import SLCNet, widened
from cfrbench_ssl.ss_net import SSNet
from tests.ssl.spy import SIDES, C, L, Spy, U, crops, halfway

FULL = {"consistency": 1.0, "ramp_length": 0}
CLASSES = [2, 4]


def made(cls: Any, num_classes: int = C, **options: Any) -> Any:
    """The method on spies, in train mode, its ramp over."""
    torch.manual_seed(0)
    method: SSLMethod = cls(lambda: Spy(num_classes), num_classes, cls.Config(**{**FULL, **options}))
    return method.train()


@pytest.mark.parametrize(("cls", "options", "num_classes"), [
    (SSNet, {"keep": "highest", "memory": 4}, 2),
    (SSNet, {"dice": "squares", "ce_weight": 1.0}, 2),
    (SSNet, {"dice": "linear"}, 4),
    (SSNet, {"voxels_per_class": 20, "epoch_steps": 150}, 4),
    (SLCNet, {"certainty": "mask", "passes": 2}, 2),
    (SLCNet, {"tested": "both"}, 4),
    (SLCNet, {"blocks": 1, "epoch_steps": 150}, 2),
])  # fmt: skip
def test_laws_in_other_forms(cls: Any, options: dict[str, Any], num_classes: int) -> None:
    check_ssl(cls, cls.Config(**options), num_classes=num_classes)


# ---------------------------------------------------------------------------------------------------------------------
# SS-Net


def test_passes_of_ss_net() -> None:
    method, batch = made(SSNet), crops()
    method.step(batch, halfway())
    seen = [image for image, _, _ in method.net.calls]
    assert [grad for _, _, grad in method.net.calls] == [True, False, True, True]
    assert all(training for _, training, _ in method.net.calls)
    assert torch.equal(seen[0], batch.image)
    assert torch.equal(seen[1], batch.image)
    for disturbed in seen[2:]:
        torch.testing.assert_close((disturbed - batch.image).flatten(1).norm(dim=1), torch.full((L + U,), 10.0),
                                   rtol=1e-3, atol=0)  # fmt: skip
    assert not torch.allclose(seen[2], seen[3])


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("dice", ["auto", "linear", "squares"])
def test_dice_and_smoothness_are_their_formulas(num_classes: int, dice: str) -> None:
    method, batch = made(SSNet, num_classes, dice=dice, xi=3.0, magnitude=5.0), crops(num_classes)
    linear = dice == "linear" or (dice == "auto" and num_classes == 2)
    torch.manual_seed(5)
    losses = method.step(batch, halfway()).losses
    torch.manual_seed(5)
    start = torch.rand_like(batch.image) - 0.5

    def predict(image: Tensor) -> Tensor:
        probabilities: Tensor = method.net.conv(image).softmax(1)
        return probabilities

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return linear_dice_loss(one, other, 1e-8) if linear else soft_dice_loss(one, other, 1e-10)

    clean = predict(batch.image).detach()
    direction = adversarial_direction(predict, batch.image, clean, start, distance, 3.0)
    torch.testing.assert_close(losses["smoothness"], distance(predict(batch.image + 5.0 * direction), clean))
    scores = predict(batch.image[:L])
    foreground = [linear_dice_loss(scores[:, name], batch.label == name, 1e-8) for name in range(1, num_classes)]
    expected = torch.stack(foreground).mean() if linear else dice_loss(scores, batch.label, smooth=1e-10)
    torch.testing.assert_close(losses["dice"], expected)
    assert losses.keys() == {"dice", "smoothness", "contrast"}


def test_cross_entropy_of_ss_net_is_an_option() -> None:
    method, batch = made(SSNet, ce_weight=0.5), crops()
    expected = 0.5 * F.cross_entropy(method.net.conv(batch.image[:L]), batch.label.long())
    torch.testing.assert_close(method.step(batch, halfway()).losses["cross-entropy"], expected)


@pytest.mark.parametrize(("step", "ramp"), [(148, 0), (149, 1), (150, 1), (40 * 150 - 1, 40)])
def test_the_ramp_counts_steps_from_one(step: int, ramp: int) -> None:
    batch, values = crops(), []
    for consistency in (1.0, None):
        method = made(SSNet, consistency=1.0, epoch_steps=150, ramp_length=40 if consistency is None else 0)
        torch.manual_seed(1)
        values.append(float(method.step(batch, Progress(step, 15000)).losses["smoothness"].detach()))
    assert values[1] == pytest.approx(values[0] * sigmoid_rampup(ramp, 40), rel=1e-5)


@pytest.mark.parametrize("num_classes", CLASSES)
def test_memory_holds_features_of_right_foreground_voxels_only(num_classes: int) -> None:
    method, batch = made(SSNet, num_classes, memory=7), crops(num_classes)
    # Nearly right: each class begins 0.2 above where the labels say so.
    cuts = torch.linspace(-1.0, 1.0, num_classes + 1)[:-1] + 0.2
    method.net.conv.weight.data = torch.arange(num_classes).view(-1, 1, 1, 1, 1).float()
    method.net.conv.bias.data = -cuts.cumsum(0)
    logits = method.net.conv(batch.image[:L])
    rows = batch.image[:L].movedim(1, -1)  # a spy's features are its image
    with torch.no_grad():
        projected = method.projection.eval()(rows.flatten(0, -2)).view(*rows.shape[:-1], -1)
    method.projection.train()
    method.step(batch, halfway())
    assert method.projection.training
    assert int(method.memory.count[0]) == 0
    for name in range(1, num_classes):
        right = projected[(logits.argmax(1) == batch.label) & (batch.label == name)]
        stored = method.memory[name]
        assert 7 < len(right) < int((batch.label == name).sum())
        assert len(stored) == 7
        assert float(torch.cdist(stored, right).amin(dim=1).max()) < 1e-3


def test_contrast_halves_the_foreground_term_and_is_weighted() -> None:
    method, batch = made(SSNet, contrast_weight=1.0), crops()
    strong = float(method.step(batch, halfway()).losses["contrast"].detach())
    again = made(SSNet, contrast_weight=0.1)
    assert float(again.step(batch, halfway()).losses["contrast"].detach()) == pytest.approx(0.1 * strong, rel=1e-4)
    assert 0.0 < strong <= 2.0 * 2.0 / 2.0  # two sets of crops, distances of at most 2, two classes


def test_fewer_voxels_go_through_the_projection_if_asked() -> None:
    shapes: list[int] = []
    for most in (None, 5):
        method = made(SSNet, voxels_per_class=most)
        method.prediction.register_forward_hook(lambda module, rows, result: shapes.append(len(rows[0])))
        method.step(crops(), halfway())
    assert shapes[:2] == [L * math.prod(SIDES), U * math.prod(SIDES)]
    assert all(2 <= count <= 5 * C for count in shapes[2:])


def test_gradients_that_wait_for_an_update_survive_a_step() -> None:
    """Several batches may make one update: the search of a direction must leave no gradient and take none away."""
    method = made(SSNet)
    for weight in method.parameters():
        weight.grad = torch.full_like(weight, 3.0)
    method.step(crops(), halfway())
    assert all(weight.grad is not None and bool((weight.grad == 3.0).all()) for weight in method.parameters())


@pytest.mark.parametrize(("cls", "path", "passes"), [
    (SSNet, "net.first.1", 2),  # the pass that learns and the clean one, as officially
    (SLCNet, "pair.first.first.1", 1),  # not the noisy ones behind the uncertainty
    (SLCNet, "pair.second.first.1", 1),
])  # fmt: skip
def test_perturbed_passes_leave_running_statistics_alone(cls: Any, path: str, passes: int) -> None:
    lab = Lab(cls, None, lambda: TinyNet(2), 2)
    method = lab.build()
    lab.output(method, halfway(), lab.batch(0))
    norm: Any = method.get_submodule(path)
    assert int(norm.num_batches_tracked) == passes
    assert norm.track_running_stats


# ---------------------------------------------------------------------------------------------------------------------
# SLC-Net


@pytest.mark.parametrize("name", ["vnet", "unet3d"])
def test_the_second_network_reads_more_channels(name: str) -> None:
    segmenter = registry.load("net", name)
    net = segmenter(segmenter.Config(width=2, depth=2)).build(1, 3)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    first = next(key for key in shapes)
    wide = widened(net, 4)
    assert shapes | {first: (shapes[first][0], 4, 3, 3, 3)} == {k: tuple(v.shape) for k, v in wide.state_dict().items()}
    weight = wide.state_dict()[first]
    assert float(weight.abs().max()) <= (4 * 27) ** -0.5, "as PyTorch initialises: uniform, by the number of inputs"
    assert tuple(wide(torch.randn(2, 4, 16, 16, 16)).shape) == (2, 3, 16, 16, 16)


@pytest.mark.parametrize("net", [nn.Sequential(nn.Linear(1, 2)), nn.Sequential(nn.Conv3d(2, 2, 1))])
def test_a_network_that_cannot_be_widened_is_refused(net: nn.Module) -> None:
    with pytest.raises(ConfigError, match="--net vnet"):
        widened(net, 3)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("certainty", ["weight", "mask"])
def test_slc_net_is_its_formula(num_classes: int, certainty: str) -> None:
    """Without noise; a spy has no dropout, so each pass behind the uncertainty is alike."""
    method, batch = made(SLCNet, num_classes, certainty=certainty, noise_std=0.0, blocks=2), crops(num_classes)
    method.pair.first.conv.weight.data.mul_(4.0)  # from unsure to sure
    progress = Progress(50, 200)
    losses = method.step(batch, progress).losses
    one = method.pair.first.conv(batch.image)
    two = method.pair.second.conv(torch.cat([batch.image, one.softmax(1)], 1))
    p = one[L:].softmax(1).detach()
    uncertainty = -(p * (p + 1e-6).log()).sum(1)
    threshold = (0.75 + 0.25 * math.exp(-5 * 0.75**2)) * math.log(2)
    weight = (-uncertainty).exp() if certainty == "weight" else (uncertainty < threshold).float()
    assert 0 < float(weight.mean()) < 1
    crossed = (
        F.cross_entropy(one[L:], two[L:].argmax(1))
        + (F.cross_entropy(two[L:], one[L:].argmax(1), reduction="none") * weight).mean()
    )
    torch.testing.assert_close(losses["pseudo-supervision"], crossed)
    label = batch.label.long()
    taught = [F.cross_entropy(z[:L], label) + block_dice_loss(z[:L].softmax(1), label, 2) for z in (one, two)]
    torch.testing.assert_close(losses["supervised"], 0.5 * (taught[0] + taught[1]))


def test_passes_of_slc_net() -> None:
    method, batch = made(SLCNet, noise_std=5.0), crops()
    output = method.step(batch, halfway())
    shown, *behind = [image for image, _, _ in method.pair.first.calls]
    assert torch.equal(shown, batch.image), "network 1 learns from the clean crop"
    assert [len(image) for image in behind] == [2 * U] * 4
    assert not any(grad for _, _, grad in method.pair.first.calls[1:])
    ((image, _, grad),) = method.pair.second.calls
    assert grad
    for noise in (image[:, :1] - batch.image, *(both - torch.cat([batch.image[L:]] * 2) for both in behind)):
        assert float(noise.detach().abs().max()) == pytest.approx(0.05, abs=1e-5)
    torch.testing.assert_close(image[:, 1:], method.pair.first.conv(batch.image).softmax(1))
    assert [len(logits) for logits in output.guided] == [U, U]


def test_the_second_network_teaches_the_first_through_its_map() -> None:
    method, batch = made(SLCNet), crops()
    second = method.step(batch, halfway()).guided[1]
    (gradient,) = torch.autograd.grad(second.square().sum(), method.pair.first.conv.weight)
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("num_classes", CLASSES)
def test_either_network_is_tested(num_classes: int) -> None:
    image = crops(num_classes).image
    first, both = made(SLCNet, num_classes), made(SLCNet, num_classes, tested="both")
    assert first.predictor() is first.pair.first
    expected = both.pair.second(torch.cat([image, both.pair.first(image).softmax(1)], 1))
    torch.testing.assert_close(both.predictor()(image), expected)


# ---------------------------------------------------------------------------------------------------------------------
# block Dice


@pytest.mark.parametrize("sides", [(7,), (6, 5), (8, 6, 5), (4, 4, 4)])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_block_dice_is_the_mean_over_its_blocks(sides: tuple[int, ...], blocks: int) -> None:
    torch.manual_seed(blocks)
    probabilities = torch.randn(2, 3, *sides).softmax(1).requires_grad_()
    target = torch.randint(0, 3, (2, *sides), dtype=torch.uint8)
    edges = [math.ceil(side / blocks) for side in sides]
    terms = []
    for place in itertools.product(range(blocks), repeat=len(sides)):
        part = tuple(slice(index * edge, (index + 1) * edge) for index, edge in zip(place, edges, strict=True))
        here = (slice(None), slice(None), *part)
        empty = probabilities[here].numel() == 0
        terms.append(torch.zeros(()) if empty else dice_loss(probabilities[here], target[(slice(None), *part)]))
    loss, plain = block_dice_loss(probabilities, target, blocks), torch.stack(terms).mean()
    torch.testing.assert_close(loss, plain)
    ours, theirs = (torch.autograd.grad(value, probabilities)[0] for value in (loss, plain))
    torch.testing.assert_close(ours, theirs)


def test_voxels_beyond_given_edges_are_left_out() -> None:
    torch.manual_seed(0)
    probabilities, target = torch.randn(1, 2, 6, 4).softmax(1), torch.randint(0, 2, (1, 6, 4))
    given = block_dice_loss(probabilities, target, 2, edges=[2, 2])
    torch.testing.assert_close(given, block_dice_loss(probabilities[:, :, :4], target[:, :4], 2))
