"""The ResNet-34 V-Net: MCF's counts, parity with a plain spelling of it, where it drops, how it starts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench.config import validate
from cfrbench.errors import ConfigError, UsageError
from cfrbench.testing import check_segmenter
from cfrbench_segmenter.resvnet import BLOCKS, ResVNetSegmenter


def build(channels: int = 1, num_classes: int = 2, **config: Any) -> Any:
    torch.manual_seed(0)
    return ResVNetSegmenter(ResVNetSegmenter.Config(**config)).build(channels, num_classes)


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(("num_classes", "total"), [(2, 17_930_354), (14, 17_930_354 + 12 * 17)])
def test_parameter_counts_of_mcf(num_classes: int, total: int) -> None:
    network = build(num_classes=num_classes)
    assert count(network) == total
    assert count(network.stem, network.stages) == 15_858_384


@pytest.mark.parametrize("depth", [1, 3])
def test_other_depths_keep_the_contract(depth: int) -> None:
    check_segmenter(ResVNetSegmenter, ResVNetSegmenter.Config(width=2, depth=depth))


def plain(state: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """The encoder in eval mode, spelt out from its description."""

    def convolved(x: Tensor, key: str, kernel: int, stride: int = 1) -> Tensor:
        x = F.conv3d(x, state[f"{key}.0.weight"], stride=stride, padding=kernel // 2)
        norm = f"{key}.1"
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"])

    features = [convolved(image, "stem", 7).clamp(min=0)]
    for stage, blocks in enumerate(BLOCKS):
        x = features[-1]
        for index in range(blocks):
            key, stride = f"stages.{stage}.{index}", 1 if index else 2
            y = convolved(convolved(x, f"{key}.first", 3, stride).clamp(min=0), f"{key}.second", 3)
            x = (y + (x if index else convolved(x, f"{key}.shortcut", 1, 2))).clamp(min=0)
        features.append(x)
    return features


def test_the_encoder_equals_its_description_spelt_out() -> None:
    network = build(channels=2, num_classes=3, width=2)
    image = torch.randn(2, 2, 32, 16, 16)
    network.train()(image)  # gives batch norm statistics of its own
    with torch.no_grad():
        for ours, theirs in zip(network.eval().encode(image), plain(network.state_dict(), image), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_it_drops_whole_channels_before_the_classifier_and_nothing_at_the_bottom() -> None:
    network = build(width=8, depth=2).train()
    image = torch.randn(4, 1, 8, 8, 8)
    before = torch.get_rng_state()
    maps = network.decode(network.encode(image))
    assert torch.equal(before, torch.get_rng_state())
    lost = network.drop(maps[0]).flatten(2).abs().sum(2) == 0
    assert 0.2 < lost.float().mean() < 0.8
    assert network.eval().drop(maps[0]) is maps[0]


def test_convolutions_start_kaiming_normal_and_no_batch_norm_at_zero() -> None:
    network = build(width=16, depth=2)
    weight = network.stages[1][1].second[0].weight
    assert float(weight.detach().std()) == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.02)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
    assert all(bool((norm.weight == 1).all()) for norm in norms)


def test_sides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="32x32x16"):
        build(width=1).eval()(torch.zeros(1, 1, 32, 24, 16))


def test_bf16_stays_near_fp32() -> None:
    network = build(width=8, depth=2).eval()
    image = torch.randn(2, 1, 16, 16, 8)
    with torch.no_grad():
        exact = network(image)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


@pytest.mark.parametrize("values", [{"depth": 5}, {"width": 0}, {"dropout": 1.0}])
def test_impossible_options_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"net\.resvnet"):
        validate(ResVNetSegmenter.Config, values, "the options of net.resvnet")
