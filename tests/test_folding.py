"""Folded copies answer as their networks, in less time; what cannot be folded is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cfrbench import folding, registry
from cfrbench.backbone import Conv3d
from cfrbench.folding import Folded, folded
from cfrbench.inference import predict_probabilities


def used(name: str) -> nn.Module:
    """A small registered network whose batch norms have seen data."""
    torch.manual_seed(0)
    segmenter = registry.load("net", name)
    network: nn.Module = segmenter(segmenter.Config(width=2)).build(1, 3)
    for _ in range(3):
        network.train()(3.0 * torch.randn(2, 1, 32, 32, 32) + 1.0)
    return network.eval()


@pytest.mark.parametrize("name", registry.names("net"))
def test_a_folded_network_answers_as_before(name: str) -> None:
    network = used(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    volume = torch.randn(32, 32, 40)
    with torch.inference_mode():
        plain, fast = (predict_probabilities(net, volume, (32, 32, 32), 8, 8, 3) for net in (network, folded(network)))
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-6)
    best = plain.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(fast.argmax(0)[clear], plain.argmax(0)[clear])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.skipif(not folding.has_onednn(), reason="this torch was built without oneDNN")
@pytest.mark.parametrize("name", ["vnet", "resvnet"])  # the U-Net's norm measures its input
def test_every_convolution_calls_onednn_and_rectifies_in_the_same_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = used(name)
    found = folded(network)
    monkeypatch.setattr(folding, "has_onednn", lambda: False)
    plain = folded(network)
    assert not any(type(module) in (nn.Conv3d, Conv3d) for module in found.modules())
    kinds = [sum(isinstance(module, nn.ReLU) for module in each.modules()) for each in (found, plain)]
    assert kinds[0] < kinds[1]
    window = torch.randn(1, 1, 32, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(found(window), plain(window), rtol=0, atol=1e-5)


class Standardised(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 7


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        conv, relu = self
        added: Tensor = relu(x + conv(x))
        return added


class OddWidth(nn.Module):
    """Reads an attribute of a layer, and computes a part in single precision by its own decision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 8, 3, padding=1)
        self.second, self.linear = nn.Conv3d(8, 8, 3, padding=1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) / self.conv.out_channels
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.linear(self.second(x.float()).permute(0, 2, 3, 4, 1))
        return y


def shared() -> nn.Module:
    conv, relu = nn.Conv3d(1, 1, 3, padding=1), nn.ReLU()
    return nn.Sequential(conv, conv, relu, conv, nn.AvgPool3d(1), conv, relu)


def hooked() -> nn.Module:
    layers = nn.Sequential(nn.Conv3d(1, 1, 3, padding=1), nn.ReLU())
    layers[0].register_forward_hook(lambda module, inputs, output: -output)
    return layers


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv3d(1, 2, 3, padding=1, padding_mode="circular"), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv3d(1, 2, 3, padding="same"), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv3d(1, 8, 3, stride=2, padding=1, dilation=2, bias=False), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv3d(1, 8, 1), nn.Conv3d(8, 8, 3, padding=(0, 1, 2), groups=4)),
        lambda: nn.Sequential(Standardised(1, 2, 3), nn.ReLU()),
        lambda: Residual(nn.Conv3d(1, 1, 3, padding=1), nn.ReLU()),
        OddWidth,
        shared,
        hooked,
    ],
)
def test_unusual_layers_fold_to_the_same_answers(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = make().eval()
    window = torch.randn(1, 1, 9, 10, 11)
    copied = folded(network)
    assert isinstance(copied, Folded)
    with torch.inference_mode():
        torch.testing.assert_close(copied(window), network(window), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(copied(window), network(window), rtol=5e-2, atol=5e-2)


def test_double_precision_is_left_to_torch() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU()).double().eval()
    window = torch.randn(1, 1, 5, 5, 5).double()
    with torch.inference_mode():
        torch.testing.assert_close(folded(network)(window), network(window))


class Peeking(nn.Module):
    """Calls the layers of a sequence one by one, and uses what is between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        between = self.layers[0](x)
        y: Tensor = self.layers[2](self.layers[1](between)) + between.mean()
        return y


@pytest.mark.skipif(not folding.has_onednn(), reason="this torch was built without oneDNN")
def test_a_copy_that_answers_otherwise_gives_way_to_its_network() -> None:
    torch.manual_seed(0)
    network = Peeking()
    copied = folded(network)
    assert isinstance(copied, Folded)
    first, second = torch.randn(2, 1, 1, 8, 8, 8)
    with torch.inference_mode():
        assert not torch.allclose(copied.network(first), network(first), rtol=0.05)  # or this test shows nothing
        for window in (first, second):
            assert torch.equal(copied(window), network(window))


def test_the_network_is_asked_once_and_without_dropout() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 8, 3), nn.Dropout(0.5), nn.Conv3d(8, 2, 1)).train()
    asked: list[bool] = []
    copied = folded(network)
    network.register_forward_hook(lambda module, inputs, output: asked.append(module.training))
    with torch.inference_mode():
        for window in torch.randn(3, 1, 1, 5, 5, 5):
            copied(window)
    assert asked == [False]
    assert copied.network is not network  # it agreed
    assert sum(1 for _ in copied.modules()) == 1 + sum(1 for _ in network.modules())


def test_the_v_net_has_no_norm_left_and_a_network_that_measures_its_input_is_left_alone() -> None:
    found = folded(used("vnet"))
    assert isinstance(found, Folded)
    assert not any(isinstance(module, nn.BatchNorm3d) for module in found.modules())
    measuring = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.InstanceNorm3d(2)).eval()
    assert folded(measuring) is measuring
    without_memory = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2, track_running_stats=False)).eval()
    assert folded(without_memory) is without_memory
