"""CauSSL's measure, its search and its consistency against what the official functions gave (``ssl_mixing.npz``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cfrbench.independence import Mixture, dependence
from cfrbench.losses import foreground_dice_loss, mean_foreground_dice_loss, mutual_distances, sharpened
from cfrbench_segmenter.vnet import VNetSegmenter
from cfrbench_ssl.caussl import CauSSL, convolution_weights
from tests.golden.ledger import ledger

book = ledger("ssl_mixing")
DECODERS = (1, 2, 3)


def take(key: str) -> Tensor:
    return torch.from_numpy(np.asarray(book.take(key)))


def layers(prefix: str) -> list[Tensor]:
    """The arrays ``prefix_0``, ``prefix_1``, ... by layer."""
    found = sorted((key for key in book.keys(prefix) if re.fullmatch(rf"{prefix}_\d+", key)),
                   key=lambda key: int(key.rpartition("_")[2]))  # fmt: skip
    assert found, prefix
    return [take(key) for key in found]


def close(actual: Tensor | float, key: str, tolerance: float = 1e-5) -> None:
    """Within 1e-5 for losses, 1e-4 for trajectories, as the notes to the file recommend."""
    assert float(actual) == pytest.approx(float(book.take(key)), abs=tolerance), key


def near(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# two networks


def toy(names: Sequence[str], weights: Sequence[Tensor]) -> nn.Module:
    """A network with these parameters, and biases between them."""
    network = nn.Module()
    for name, weight in zip(names, weights, strict=True):
        parent = network
        *path, last = name.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(last, nn.Parameter(weight.clone()))
        parent.register_parameter("bias", nn.Parameter(torch.zeros(len(weight))))
    return network


def test_every_convolution_of_a_network_is_measured_in_order() -> None:
    names, weights = book.take("caussl_cps_layer_names").tolist(), layers("caussl_cps_w1")
    near(convolution_weights(toy(names, weights)), weights, 0)


def test_the_measure_of_two_networks_and_its_gradients() -> None:
    filters = [layer.requires_grad_() for layer in layers("caussl_cps_w1")]
    companions = [layer.requires_grad_() for layer in layers("caussl_cps_w2")]
    coefficients = [layer.requires_grad_() for layer in layers("caussl_cps_coef")]
    measure = dependence(filters, companions, coefficients)
    close(measure.detach(), "caussl_cps_measure")
    measure.backward()  # type: ignore[no-untyped-call]
    near([layer.grad for layer in filters if layer.grad is not None], layers("caussl_cps_grad_w1"), 1e-6)
    near([layer.grad for layer in coefficients if layer.grad is not None], layers("caussl_cps_grad_coef"), 1e-6)
    assert all(layer.grad is None for layer in companions)


def test_the_search() -> None:
    filters, companions, start = layers("caussl_cps_w1"), layers("caussl_cps_w2"), layers("caussl_cps_coef")
    mixture = Mixture([(matrix.shape[0], matrix.shape[1]) for matrix in start])
    mixture.values.copy_(torch.cat([matrix.flatten() for matrix in start]))
    trace, rate = take("caussl_cps_max_trace"), CauSSL.Config().search_rate
    for before in trace:  # one by one: the state of Adam is kept between calls
        assert float(mixture.dependence(filters, companions)) == pytest.approx(float(before), abs=1e-4)
        mixture.search(filters, companions, steps=1, rate=rate)
    close(mixture.dependence(filters, companions), f"caussl_cps_measure_after{len(trace)}", 1e-4)
    found = torch.cat([matrix.flatten() for matrix in layers(f"caussl_cps_coef_after{len(trace)}")])
    torch.testing.assert_close(mixture.values, found, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# three decoders


def three_decoders(**options: Any) -> Any:
    """The method on a V-Net with the stored filters and coefficients."""
    stored = [layers(f"caussl_mc_w{decoder}") for decoder in DECODERS]
    classes, width = stored[0][-1].shape[:2]
    segmenter = VNetSegmenter(VNetSegmenter.Config(width=width))
    method = CauSSL(lambda: segmenter.build(1, classes), classes, CauSSL.Config(**options))
    with torch.no_grad():
        for filters, values in zip(method._filters(), stored, strict=True):
            for weight, value in zip(filters, values, strict=True):
                assert weight.shape == value.shape
                weight.copy_(value)
        for decoder, mixture in zip(DECODERS, method.mixtures, strict=False):
            coefficients = layers(f"caussl_mc_coef{decoder}")
            assert isinstance(mixture, Mixture)
            assert mixture._shapes == tuple(matrix.shape for matrix in coefficients)
            mixture.values.copy_(torch.cat([matrix.flatten() for matrix in coefficients]))
    return method


def measures(method: Any) -> list[Tensor]:
    return [mixture.dependence(own, rows) for mixture, own, rows in method._measured(method._filters())]


def reached(method: Any, value: Tensor) -> int:
    """How many parameters of the network get a gradient from ``value``."""
    gradients = torch.autograd.grad(value, list(method.shared.parameters()), allow_unused=True, retain_graph=True)
    return sum(gradient is not None for gradient in gradients)


def test_the_layers_that_decoders_share() -> None:
    method = three_decoders()
    named = {id(weight): name for name, weight in method.shared.net.named_parameters()}
    assert [named[id(weight)] for weight in method._filters()[0]] == book.take("caussl_mc_layer_names").tolist()


def test_the_measures_of_three_decoders() -> None:
    method = three_decoders()
    for decoder, measure in zip(DECODERS, measures(method), strict=True):
        close(measure.detach(), f"caussl_mc_measure{decoder}")
        assert reached(method, measure) == len(method._filters()[0]), "each moves the filters of its own decoder"


def test_officially_only_the_first_measure_reaches_the_network() -> None:
    expected = [int(book.take(f"caussl_mc_net_params_with_grad{decoder}")) for decoder in DECODERS]
    official = three_decoders(penalised="first")
    found = [reached(official, measure) for measure in measures(official)]
    assert [*found, 0, 0] == expected


def test_the_consistency_of_three_decoders() -> None:
    known, temperature = int(book.take("caussl_mc_labeled_bs")), CauSSL.Config().temperature
    logits = [take(f"caussl_mc_logits{decoder}").requires_grad_() for decoder in DECODERS]
    targets = [sharpened(values.detach(), temperature) for values in logits]
    near(targets[:1], [take("caussl_mc_sharp1")], 1e-5)
    unknown = [values[known:].softmax(1) for values in logits]
    distances = mutual_distances(unknown, [target[known:] for target in targets])
    for decoder, distance in zip(DECODERS, distances, strict=True):
        close(distance.detach(), f"caussl_mc_consistency{decoder}")
    close(distances.sum().detach(), "caussl_mc_consistency_total")
    gradients = torch.autograd.grad(distances.sum(), logits)
    near(gradients, [take(f"caussl_mc_consistency_grad{decoder}") for decoder in DECODERS], 1e-6)


def test_dice() -> None:
    probabilities, label = take("caussl_mc_logits1").softmax(1), take("caussl_dice_label").to(torch.uint8)
    close(foreground_dice_loss(probabilities[:, 1], label == 1), "caussl_dice_loss")
    two = torch.stack([1 - probabilities[:, 1], probabilities[:, 1]], dim=1)
    close(mean_foreground_dice_loss(two, label), "caussl_dice_loss")
