"""The 3D U-Net: counts of the field, parity with a plain spelling of it, where it drops, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cfrbench import registry
from cfrbench.config import validate
from cfrbench.errors import ConfigError, UsageError
from cfrbench.testing import check_segmenter

UNet3D: Any = registry.load("net", "unet3d")
FORMS = ("plain", "deep-supervision")


def build(channels: int = 1, num_classes: int = 2, **config: Any) -> Any:
    torch.manual_seed(0)
    return UNet3D(UNet3D.Config(**config)).build(channels, num_classes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_classes", "count"), [(2, 5_884_050), (14, 5_884_050 + 12 * 17)])
def test_parameter_counts_of_the_field(form: str, num_classes: int, count: int) -> None:
    network = build(num_classes=num_classes, form=form)
    assert sum(p.numel() for p in network.parameters()) == count
    assert len(list(network.parameters())) == 38


def test_other_forms_keep_the_contract() -> None:
    check_segmenter(UNet3D, UNet3D.Config(form="deep-supervision", width=2, depth=2))


def plain(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """The full network in eval mode, spelt out from its description."""

    def block(x: Tensor, key: str) -> Tensor:
        for half in ("conv1", "conv2"):
            x = F.conv3d(x, state[f"{key}.{half}.0.weight"], state[f"{key}.{half}.0.bias"], padding=1)
            mean, var = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), correction=0, keepdim=True)
            x = ((x - mean) / (var + 1e-5).sqrt()).clamp(min=0)
        return x

    skips = [block(image, "conv1")]
    for number in (2, 3, 4):
        skips.append(block(F.max_pool3d(skips[-1], 2), f"conv{number}"))
    x = block(F.max_pool3d(skips[-1], 2), "center")
    for number in (4, 3, 2, 1):
        raised = F.interpolate(x, size=skips[-1].shape[2:], mode="trilinear")
        x = block(torch.cat([skips.pop(), raised], 1), f"up_concat{number}.conv")
    return F.conv3d(x, state["out_conv.weight"], state["out_conv.bias"])


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_description_spelt_out(form: str) -> None:
    network = build(channels=2, num_classes=3, width=4, form=form).eval()
    image = torch.randn(2, 2, 32, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(image), plain(network.state_dict(), image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_in_turn_are_the_network_bit_for_bit(form: str) -> None:
    network = build(num_classes=3, width=4, form=form).train()
    image = torch.randn(2, 1, 32, 16, 32)
    torch.manual_seed(1)
    whole = network(image)
    torch.manual_seed(1)
    features = network.encode(image)
    given = [feature.clone() for feature in features]
    maps = network.decode(features)
    assert torch.equal(network.out_conv(network.drop(maps[0])), whole)
    assert all(map(torch.equal, features, given))
    sides = [(2, width, 32 >> level, 16 >> level, 32 >> level) for level, width in enumerate(network.widths)]
    assert [tuple(feature.shape) for feature in features] == sides
    assert [tuple(map_.shape) for map_ in maps] == sides[:-1]


def silent_channels(x: Tensor) -> Tensor:
    return x.flatten(2).abs().sum(2) == 0


def test_deep_supervision_drops_whole_channels_on_every_level_and_nothing_at_the_bottom() -> None:
    network = build(width=16, form="deep-supervision", level_dropout=(0.5, 0.5, 0.5, 0.5)).train()
    features = network.encode(torch.randn(2, 1, 32, 16, 16))
    assert not silent_channels(features[-1]).any()
    for map_ in network.decode(features):
        assert 0.2 < silent_channels(map_).float().mean() < 0.8
    assert network.drop(features[0]) is features[0]


def test_the_plain_form_drops_single_values_at_the_bottom_and_before_the_classifier() -> None:
    network = build(width=16).train()
    image = torch.randn(2, 1, 32, 16, 16)
    features = network.encode(image)
    undropped = build(width=16).eval().encode(image)
    assert torch.equal(features[0], undropped[0])
    lost = (features[-1] == 0) & (undropped[-1] != 0)
    assert 0.2 < lost.sum() / (undropped[-1] != 0).sum() < 0.4
    (level, *_) = network.decode(features)
    assert 0.2 < ((network.drop(level) == 0) & (level != 0)).sum() / (level != 0).sum() < 0.4


def test_convolutions_start_kaiming_normal() -> None:
    weight = build(width=16).center.conv2[0].weight
    assert float(weight.detach().std()) == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.02)


def test_a_further_decoder_serves_the_features_of_another_network() -> None:
    first, second = build(width=2).eval(), build(width=2).eval()
    image = torch.randn(1, 1, 32, 16, 16)
    whole = second(image)
    second.remove_encoder()
    assert {name.split(".")[0].rstrip("1234") for name, _ in second.named_parameters()} == {"up_concat", "out_conv"}
    assert torch.equal(second.segment(first.encode(image)), whole)


@pytest.mark.parametrize(("sides", "words"), [((32, 24, 16), "32x32x16"), ((16, 16, 16), "one voxel")])
def test_sides_that_do_not_fit_are_refused(sides: tuple[int, int, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build(width=1).eval()(torch.zeros(1, 1, *sides))


def test_bf16_stays_near_fp32() -> None:
    network = build(width=8, depth=2).eval()
    image = torch.randn(2, 1, 16, 16, 8)
    with torch.no_grad():
        exact = network(image)
        network.to(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image.contiguous(memory_format=torch.channels_last_3d))
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


@pytest.mark.parametrize("values", [{"depth": 5}, {"form": "deep"}, {"level_dropout": (0.1, 0.2)}])
def test_impossible_options_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"net\.unet3d"):
        validate(UNet3D.Config, values, "the options of net.unet3d")
