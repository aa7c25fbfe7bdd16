"""SS-Net's adversarial direction, memory and contrastive loss against ``ssl_mixing.npz``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench.adversarial import adversarial_direction, unit
from cfrbench.losses import linear_dice_loss
from cfrbench.memory_bank import ClassScores, MemoryBank, contrastive_loss
from tests.golden.ledger import ledger

book = ledger("ssl_mixing")
LENGTH = 10.0  # xi and eps of the official code


def take(key: str) -> Tensor:
    return torch.from_numpy(np.asarray(book.take(key)))


def near(actual: Tensor, key: str, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.detach(), take(key).to(actual.dtype), rtol=0, atol=atol)


def distance(one: Tensor, other: Tensor) -> Tensor:
    return linear_dice_loss(one, other, smooth=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# losses


def test_dice() -> None:
    near(distance(take("ssnet_dice_prob"), take("ssnet_dice_label") == 1), "ssnet_dice_loss")


def test_unit_length() -> None:
    near(unit(take("ssnet_l2_input")), "ssnet_l2_output")


class Recorded(nn.Module):
    """The stored network; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {f"{layer}_{part}": nn.Parameter(take(f"ssnet_vat_net_{layer}_{part}").clone())
             for layer in ("c1", "c2") for part in ("weight", "bias")}
        )  # fmt: skip
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image.detach())
        weights = self.weights
        hidden = F.conv3d(image, weights["c1_weight"], weights["c1_bias"], padding="same").tanh()
        return F.conv3d(hidden, weights["c2_weight"], weights["c2_bias"]).softmax(dim=1)


def test_adversarial_smoothness() -> None:
    network, image = Recorded(), take("ssnet_vat_x")
    with torch.no_grad():
        clean = network(image)
    start = take("ssnet_vat_uniform") - 0.5
    direction = adversarial_direction(network, image, clean, start, distance, LENGTH)
    assert all(weight.grad is None for weight in network.parameters())
    near(network.seen[1], "ssnet_vat_first_perturbed")
    near(direction, "ssnet_vat_direction", atol=1e-4)
    loss = distance(network(image + LENGTH * direction), clean)
    near(network.seen[2], "ssnet_vat_adv_input", atol=1e-3)  # ten directions
    near(loss, "ssnet_vat_lds")
    (gradient,) = torch.autograd.grad(loss, network.weights["c2_weight"])
    near(gradient, "ssnet_vat_grad_c2_weight")


# ---------------------------------------------------------------------------------------------------------------------
# memory and contrast


def scores() -> ClassScores:
    """The stored score networks; their batch norms are new."""
    weight = take("ssnet_sel_l0_weight")
    network = ClassScores(len(weight), weight.shape[1])
    names = {"hidden_weight": "l0_weight", "hidden_bias": "l0_bias", "out_weight": "l3_weight", "out_bias": "l3_bias"}
    network.load_state_dict({own: take(f"ssnet_sel_{key}") for own, key in names.items()}, strict=False)
    return network


def filled() -> MemoryBank:
    features = take("ssnet_mem_features")
    bank = MemoryBank(len(take("ssnet_mem_filled")), int(take("ssnet_mem_per_class")), features.shape[1])
    bank.update(features, take("ssnet_mem_labels"), scores())
    return bank


def test_memory() -> None:
    bank = filled()
    assert torch.equal(bank.count, take("ssnet_mem_count"))
    assert torch.equal(bank.count > 0, take("ssnet_mem_filled"))
    stored = book.keys("ssnet_mem_bank_")
    assert len(stored) == int((bank.count > 0).sum())
    for key in stored:
        near(bank[int(key.removeprefix("ssnet_mem_bank_"))], key)


def test_contrastive_loss_and_its_gradient() -> None:
    bank, features = filled(), take("ssnet_con_features").requires_grad_()
    assert len(bank) == int(take("ssnet_con_num_classes"))
    scorers = scores()
    loss = contrastive_loss(features, take("ssnet_con_labels"), bank, scorers)
    near(loss, "ssnet_con_loss")
    loss.backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    near(features.grad, "ssnet_con_grad")
    # Why there is no network that scores what is stored: the official one has no gradient next to these.
    learning = max(float(weight.grad.abs().max()) for weight in scorers.parameters() if weight.grad is not None)
    assert float(take("ssnet_con_memory_selector_grad_absmax")) < 1e-4 * learning


@pytest.mark.parametrize("keep", ["lowest", "highest"])
def test_what_is_kept(keep: str) -> None:
    """A plain sort of the scores, from the end that is asked for."""
    features, labels, size = take("ssnet_mem_features"), take("ssnet_mem_labels"), int(take("ssnet_mem_per_class"))
    bank = MemoryBank(len(take("ssnet_mem_filled")), size, features.shape[1])
    bank.update(features, labels, scores(), keep)  # type: ignore[arg-type]
    for name in range(1, len(bank)):
        found = features[labels == name]
        if len(found) > size:  # fewer are all kept, and of one alone no score can be computed
            values = scores()(found, name).tolist()
            order = sorted(range(len(found)), key=values.__getitem__, reverse=keep == "highest")
            found = found[order[:size]]
        assert torch.equal(bank[name], found)
