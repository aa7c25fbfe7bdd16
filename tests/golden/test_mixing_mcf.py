"""MCF against what the official statements gave (``ssl_mixing.npz``); both networks return stored logits."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cfrbench.contracts import Batch
from cfrbench.losses import cross_entropy, disagreement, masked_mean, mean_foreground_dice_loss, one_hot, sharpened
from cfrbench_ssl.mcf import MCF
from tests.golden.ledger import ledger
from tests.golden.ssl_cases import Stored, StoredBackbone, progress_at, total

book = ledger("ssl_mixing")
CASES = sorted({found[1] for key in book.keys("mcf_") if (found := re.match(r"(mcf_[^_]+)_v_logits$", key))})
assert CASES

#: the file does not name it: it is the default of the official script
ITERATIONS = 6000


def take(key: str) -> Tensor:
    return torch.from_numpy(np.asarray(book.take(key)))


def close(actual: Tensor | float, key: str) -> None:
    """Within 1e-5, as the notes to the file recommend."""
    assert float(actual) == pytest.approx(float(book.take(key)), abs=1e-5), key


def made(case: str) -> tuple[Any, Batch]:
    """The method in its original form on stored logits, and its batch: what has no pseudo-label is labelled."""
    first, second = take(f"{case}_v_logits"), take(f"{case}_r_logits")
    method = MCF(lambda: StoredBackbone(first), first.shape[1], MCF.Config(**MCF.configs["original"]))
    method.both.networks[1] = Stored(second)
    known = len(first) - len(take(f"{case}_pseudo_label"))
    image = torch.zeros(len(first), 1, *first.shape[2:])
    return method.train(), Batch(image, take(f"{case}_label")[:known].to(torch.uint8))


@pytest.mark.parametrize("case", CASES)
def test_the_parts(case: str) -> None:
    method, batch = made(case)
    known, label = batch.labelled, batch.label
    logits = {"v": take(f"{case}_v_logits"), "r": take(f"{case}_r_logits")}
    differ = disagreement(logits["v"][:known], logits["r"][:known])
    assert torch.equal(differ[:, 0], take(f"{case}_diff_mask").bool())
    dices = []
    for name, values in logits.items():
        probabilities = values[:known].softmax(1)
        entropy, dice = cross_entropy(values[:known], label), mean_foreground_dice_loss(probabilities, label)
        error = masked_mean((probabilities - one_hot(label, values.shape[1]).float()).square(), differ)
        close(entropy, f"{case}_{name}_loss_seg")
        close(dice, f"{case}_{name}_loss_seg_dice")
        close(error, f"{case}_{name}_mse")
        close(entropy + dice + method.config.rectification * error, f"{case}_{name}_supervised_loss")
        dices.append(float(dice))
    better = int(book.take(f"{case}_good_student"))
    assert dices[better] == min(dices)
    target = sharpened(list(logits.values())[better][known:], method.config.temperature)
    torch.testing.assert_close(target, take(f"{case}_pseudo_label"), rtol=0, atol=1e-5)
    distance = (list(logits.values())[1 - better][known:].softmax(1) - target).square().mean()
    close(distance, f"{case}_consistency_loss")


@pytest.mark.parametrize("case", CASES)
def test_a_step(case: str) -> None:
    method, batch = made(case)
    progress = progress_at(int(book.take(f"{case}_iter")), ITERATIONS)
    weight = method.config.weight(progress)
    close(weight, f"{case}_consistency_weight")
    output = method.step(batch, progress)
    losses = {name: loss.detach() for name, loss in output.losses.items()}
    taught = float(book.take(f"{case}_v_supervised_loss")) + float(book.take(f"{case}_r_supervised_loss"))
    assert float(losses["supervised"] + losses["rectification"]) == pytest.approx(taught, abs=2e-5)
    close(losses["consistency"] / weight, f"{case}_consistency_loss")
    both = float(book.take(f"{case}_v_loss")) + float(book.take(f"{case}_r_loss"))
    assert float(total(output).detach()) == pytest.approx(both, abs=2e-5)
    # The better network's loss is what labels teach it, the other's has the consistency on top.
    extra = {name: float(book.take(f"{case}_{name}_loss")) - float(book.take(f"{case}_{name}_supervised_loss"))
             for name in "vr"}  # fmt: skip
    better, worse = ("v", "r") if int(book.take(f"{case}_good_student")) == 0 else ("r", "v")
    assert extra[better] == pytest.approx(0, abs=1e-6)
    assert extra[worse] == pytest.approx(float(losses["consistency"]), abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    method, batch = made(case)
    total(method.step(batch, progress_at(int(book.take(f"{case}_iter")), ITERATIONS))).backward()  # type: ignore[no-untyped-call]
    first, second = method.both.networks
    for stored, name in ((first.out_conv, "v"), (second, "r")):
        expected = take(f"{case}_{name}_grad")
        assert (stored.logits.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name
