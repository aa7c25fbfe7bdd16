"""The six networks of ``ssl_consistency.npz``: two segmenters, and what methods make of them by attaching heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from tests.golden.ssl_cases import book, take

VNET_HEADS = {f"out_conv_dp{3 - index}": f"heads.{index}" for index in range(3)}
UNET_HEADS = {f"dsv{4 - index}.dsv.0": f"heads.{index}" for index in range(3)}


@dataclass(frozen=True)
class Network:
    """A segmenter, the method that attaches its heads if any, and which of our layers an official one is."""

    segmenter: str
    options: Mapping[str, Any]
    method: str = ""
    method_options: Mapping[str, Any] | None = None
    layers: Mapping[str, str] | None = None  # official name of a layer -> ours, where it is another


NETWORKS = {
    "vnet": Network("vnet", {}),
    "vnet_mtpd": Network("vnet", {}),
    "unet3d": Network("unet3d", {}, layers={"final": "out_conv"}),
    "vnet_sdf": Network("vnet", {}, "dtc", {"form": "sigmoid"}, {"out_conv": "level_set.0", "out_conv2": "out_conv.0"}),
    "hier_vnet": Network("vnet", {}, "urpc", {"upsample": "nearest"}, VNET_HEADS),
    "hier_unet3d": Network(
        "unet3d", {"form": "deep-supervision"}, "urpc", {"upsample": "trilinear"}, UNET_HEADS | {"dsv1": "out_conv"}
    ),
}


def built(name: str) -> nn.Module:
    """The network alone, or the method with it inside, in eval mode with the weights of the fill rule."""
    what, width = NETWORKS[name], int(str(book.arrays[f"net.{name}.param_shapes"][0]).split("x")[0])
    channels, classes = take("net.input").shape[1], int(take("net.n_classes"))
    if what.method == "dtc":
        classes = 2  # one channel per head, however many classes the other networks have
    segmenter = registry.load("net", what.segmenter)
    net = segmenter(segmenter.Config(width=width, **what.options)).build(channels, classes)
    whole = net
    if what.method:
        plugin = registry.load("ssl", what.method)
        whole = plugin(lambda: net, classes, plugin.Config(**(what.method_options or {})))
    fill(whole, name, "net." if what.method else "")
    return whole.eval()


def ours(official: str, what: Network, inside: str) -> str:
    """Our name of an official parameter."""
    layer, _, kind = official.rpartition(".")
    renamed = (what.layers or {}).get(layer, layer)
    attached = renamed.startswith(("heads.", "level_set."))
    return f"{renamed}.{kind}" if attached else f"{inside}{renamed}.{kind}"


def fill(whole: nn.Module, name: str, inside: str) -> None:
    """Fill by the rule of the golden description, in the official order; check names, shapes, counts and sum."""
    rng, magnitude = np.random.RandomState(int(take("net.fill_seed"))), 0.0
    state: dict[str, Tensor] = {}
    names, shapes = book.take(f"net.{name}.param_names"), book.take(f"net.{name}.param_shapes")
    for official, shape in zip(names.tolist(), shapes.tolist(), strict=True):
        sides = [int(side) for side in shape.split("x")]
        draw = rng.standard_normal(sides)
        if len(sides) > 1:
            draw *= math.sqrt(2.0 / math.prod(sides[1:]))
        else:
            draw = 1.0 + 0.1 * draw if official.endswith("weight") else 0.1 * draw
        state[ours(official, NETWORKS[name], inside)] = torch.from_numpy(draw.astype(np.float32))
        magnitude += float(np.abs(draw).sum())
    parameters = dict(whole.named_parameters())
    assert {key: tuple(value.shape) for key, value in parameters.items()} == {
        key: tuple(value.shape) for key, value in state.items()
    }
    assert sum(value.numel() for value in parameters.values()) == int(take(f"net.{name}.param_count"))
    assert magnitude == pytest.approx(float(take(f"net.{name}.fill_abs_sum")), rel=1e-6)
    whole.load_state_dict(state, strict=False)
    first = next(iter(state))
    assert torch.equal(parameters[first].detach().flatten()[:5], take(f"net.{name}.first_weight_5"))


def near(actual: Tensor, key: str) -> None:
    torch.testing.assert_close(actual, take(key).to(actual.dtype), rtol=0, atol=1e-4)


def check_output(name: str, output: Tensor, label: str) -> None:
    """Whatever the file holds of one output: all of it, every second voxel, the first voxels, two means."""
    key = f"net.{name}.{label}"
    parts = {
        "": output,
        "_sub": output[:, :, ::2, ::2, ::2],
        "_corner": output[:, :, :6, :6, :4],
        "_mean": output.double().mean(),
        "_absmean": output.double().abs().mean(),
    }
    held = [suffix for suffix in parts if book.has(key + suffix)]
    assert held
    for suffix in held:
        near(parts[suffix], key + suffix)


def test_every_network_of_the_file_is_here() -> None:
    assert {key.split(".")[1] for key in book.keys("net.") if key.count(".") > 1} == set(NETWORKS)


def test_the_vnet_keeps_the_official_order() -> None:
    # Published checkpoints load by name; the order is that in which weights are drawn.
    for name in ("vnet", "vnet_mtpd"):
        assert list(dict(built(name).named_parameters())) == book.take(f"net.{name}.param_names").tolist()


@pytest.mark.parametrize("name", ["vnet", "vnet_mtpd", "unet3d"])
@torch.no_grad()
def test_segmenters(name: str) -> None:
    check_output(name, built(name)(take("net.input")), "out")


@torch.no_grad()
def test_the_features_that_prototypes_read() -> None:
    network: Any = built("vnet_mtpd")
    features = network.decode(network.encode(take("net.input")))[1]
    shape = tuple(int(side) for side in book.take("net.vnet_mtpd.feature_shape"))
    assert shape == tuple(features.shape)
    near(features.mean(), "net.vnet_mtpd.feature_mean")
    corner = take("net.vnet_mtpd.feature_corner")
    _, channels, x, y, z = corner.shape
    near(features[:, :channels, :x, :y, :z], "net.vnet_mtpd.feature_corner")


@torch.no_grad()
def test_the_two_heads_of_dtc() -> None:
    dtc: Any = built("vnet_sdf")
    maps = dtc.net.decode(dtc.net.encode(take("net.input")))
    check_output("vnet_sdf", dtc.level_set(maps[0]), "out_tanh")
    check_output("vnet_sdf", dtc.predictor()(take("net.input"))[:, 1:], "out_seg")


@pytest.mark.parametrize("name", ["hier_vnet", "hier_unet3d"])
@torch.no_grad()
def test_the_scales_of_urpc(name: str) -> None:
    urpc: Any = built(name)
    main, *others = urpc.outputs(take("net.input"))
    check_output(name, main, "out_main")
    assert torch.equal(main, urpc.predictor()(take("net.input")))
    for index, output in enumerate(others, start=1):
        assert output.shape == main.shape
        check_output(name, output, f"out_aux{index}")
