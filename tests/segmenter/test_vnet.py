"""The V-Net: the field's keys and counts, smaller depths, refusals, and parity with a plain spelling of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench import registry
from cfrbench.config import validate
from cfrbench.errors import ConfigError, UsageError

VNet: Any = registry.load("net", "vnet")


def build(channels: int = 1, num_classes: int = 2, **config: Any) -> Any:
    torch.manual_seed(0)
    return VNet(VNet.Config(**config)).build(channels, num_classes)


@pytest.mark.parametrize(("num_classes", "count"), [(2, 9_448_866), (14, 9_449_070)])
def test_parameter_counts_of_the_field(num_classes: int, count: int) -> None:
    network = build(num_classes=num_classes)
    assert sum(p.numel() for p in network.parameters()) == count
    assert len(list(network.parameters())) == 118


def plain(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """The full V-Net in eval mode, spelt out from its description; slow and without modules."""

    def unit(x: Tensor, key: str, index: int, **how: Any) -> Tensor:
        convolve = F.conv_transpose3d if key.endswith("_up") else F.conv3d
        x = convolve(x, state[f"{key}.conv.{index}.weight"], state[f"{key}.conv.{index}.bias"], **how)
        norm = f"{key}.conv.{index + 1}"
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"]).clamp(min=0)

    def block(x: Tensor, word: str, convolutions: int) -> Tensor:
        for index in range(convolutions):
            x = unit(x, f"block_{word}", 3 * index, padding=1)
        return x

    x1 = block(image, "one", 1)
    x2 = block(unit(x1, "block_one_dw", 0, stride=2), "two", 2)
    x3 = block(unit(x2, "block_two_dw", 0, stride=2), "three", 3)
    x4 = block(unit(x3, "block_three_dw", 0, stride=2), "four", 3)
    x5 = block(unit(x4, "block_four_dw", 0, stride=2), "five", 3)
    x6 = block(unit(x5, "block_five_up", 0, stride=2) + x4, "six", 3)
    x7 = block(unit(x6, "block_six_up", 0, stride=2) + x3, "seven", 3)
    x8 = block(unit(x7, "block_seven_up", 0, stride=2) + x2, "eight", 2)
    x9 = block(unit(x8, "block_eight_up", 0, stride=2) + x1, "nine", 1)
    return F.conv3d(x9, state["out_conv.weight"], state["out_conv.bias"])


def test_equals_the_description_spelt_out() -> None:
    network = build(channels=2, num_classes=3, width=4)
    image = torch.randn(2, 2, 32, 16, 16)
    network.train()(image)  # gives batch norm statistics of its own
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(image), plain(network.state_dict(), image))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_shallow_net_keeps_names_and_shapes_of_what_remains(depth: int) -> None:
    full = {name: tensor.shape for name, tensor in build(width=4).state_dict().items()}
    shallow = build(width=4, depth=depth)
    assert {name: tensor.shape for name, tensor in shallow.state_dict().items()}.items() < full.items()
    side = 1 << depth
    assert shallow(torch.zeros(2, 1, 2 * side, side, side)).shape == (2, 2, 2 * side, side, side)


@settings(max_examples=25, deadline=None)
@given(depth=st.integers(1, 4), sides=st.tuples(*[st.integers(1, 40)] * 3))
def test_sides_are_taken_or_refused_with_ones_that_fit(depth: int, sides: tuple[int, int, int]) -> None:
    network = build(width=1, depth=depth).eval()
    segmenter = VNet(VNet.Config(depth=depth))
    assert segmenter.divisor == 2**depth
    image = torch.zeros(1, 1, *sides)
    if all(side % segmenter.divisor == 0 for side in sides):
        assert network(image).shape == (1, 2, *sides)
        return
    with pytest.raises(UsageError) as refusal:
        network(image)
    words = str(refusal.value)
    assert "x".join(map(str, sides)) in words
    assert f"multiple of {segmenter.divisor}" in words
    proposed = next(word for word in words.replace("(", " ").split("such as ")[1].split())
    assert network(torch.zeros(1, 1, *map(int, proposed.split("x")))).shape[0] == 1


def test_dropout_works_on_whole_channels_in_training_only() -> None:
    network = build(width=8, depth=1, dropout=0.5)
    seen: list[Tensor] = []
    network.out_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.randn(4, 1, 8, 8, 8)
    torch.manual_seed(1)
    network.train()(image)
    network.eval()(image)
    training, testing = (x.detach().flatten(2).abs().sum(2) == 0 for x in seen)
    assert training.any()
    assert not testing.any()


def test_without_dropout_no_random_number_is_drawn() -> None:
    network = build(width=2, depth=1, dropout=0.0).train()
    before = torch.get_rng_state()
    network(torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.get_rng_state())


def test_one_seed_gives_the_initial_weights_of_torch_layers_in_order() -> None:
    network = build(width=2)
    torch.manual_seed(0)
    first, down = nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 4, 2, stride=2)
    state = network.state_dict()
    assert torch.equal(state["block_one.conv.0.weight"], first.weight)
    assert torch.equal(state["block_one_dw.conv.0.weight"], down.weight)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_bf16_keeps_the_memory_order_and_stays_near_fp32(memory_format: torch.memory_format) -> None:
    network = build(width=8, depth=2).eval()
    image = torch.randn(2, 1, 16, 16, 8)
    with torch.no_grad():
        exact = network(image)
        network.to(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image.contiguous(memory_format=memory_format))
    assert logits.dtype == torch.bfloat16
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # else torch's own kernels answer, in an order of theirs
        assert logits.is_contiguous(memory_format=memory_format)
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


@pytest.mark.parametrize("values", [{"depth": 5}, {"width": 0}, {"dropout": 1.0}, {"filters": 16}])
def test_impossible_options_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"net\.vnet"):
        validate(VNet.Config, values, "the options of net.vnet")


def test_the_parts_in_turn_are_the_network_bit_for_bit() -> None:
    network = build(num_classes=3, width=4).train()
    image = torch.randn(2, 1, 32, 16, 16)
    torch.manual_seed(1)
    whole = network(image)
    torch.manual_seed(1)
    features = network.encode(image)
    given = [feature.clone() for feature in features]
    maps = network.decode(features)
    assert torch.equal(network.out_conv(network.drop(maps[0])), whole)
    assert all(map(torch.equal, features, given))
    sides = [(2, width, 32 >> level, 16 >> level, 16 >> level) for level, width in enumerate(network.widths)]
    assert [tuple(feature.shape) for feature in features] == sides
    assert [tuple(map_.shape) for map_ in maps] == sides[:-1]


def test_a_further_decoder_serves_the_features_of_another_network() -> None:
    first, second = build(width=2).eval(), build(width=2).eval()
    image = torch.randn(1, 1, 16, 16, 16)
    whole = second(image)
    second.remove_encoder()
    assert not [name for name, _ in second.named_parameters() if name.split(".")[0].endswith(("_dw", "five", "one"))]
    assert torch.equal(second.segment(first.encode(image)), whole)


def test_instance_norm_keeps_crops_apart_and_needs_no_statistics() -> None:
    alone, beside = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1)).split(1)
    for norm, apart in (("instance", True), ("batch", False)):
        network = build(width=2, depth=2, dropout=0.0, norm=norm).train()
        together = network(torch.cat([alone, 3 * beside + 1]))[:1]
        assert torch.allclose(together, network(alone), atol=1e-5) is apart
    network = build(width=2, depth=2, norm="instance").eval()
    assert not list(network.buffers())
    assert torch.equal(network(alone), network(alone))
    network(alone).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_instance_norm_refuses_a_bottleneck_of_one_voxel() -> None:
    network = build(width=2, depth=2, norm="instance")
    network(torch.zeros(1, 1, 4, 4, 8))
    with pytest.raises(UsageError, match=r"one voxel at the bottom.*net\.vnet\.norm=batch"):
        network(torch.zeros(2, 1, 4, 4, 4))
