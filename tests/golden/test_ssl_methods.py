"""The SSL plug-ins and the V-Net against what the official statements gave (``ssl_consistency.npz``).

The plug-ins are the real ones; their networks are stand-ins that return stored logits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.guidance import guidance_loss
from cfrbench.schedules import threshold_rampup
from tests.golden.ledger import ledger

book = ledger("ssl_consistency")

ISSUE_5 = {
    "uamt": "UA-MT",
    "uamt_all": "UA-MT on the whole batch",
    "uamt_gen": "UA-MT for more classes",
    "ict": "ICT",
    "cps": "CPS",
    "heads": "heads of CCT and URPC",
    "cct": "CCT",
    "urpc": "URPC",
    "cpcl": "CPCL",
    "dtc": "DTC",
    "sdf": "signed distance maps of DTC",
    "acmt_mu": "ACMT by model uncertainty",
    "acmt_perr": "ACMT by prototype error",
    "acmt_serr": "ACMT by self-identified error",
}
ISSUE_5_SHARED = {
    "cl.": "confident learning of ACMT by self-identified error",
    "cct_pert.": "feature perturbations of CCT",
    "net.unet3d.": "the 3D U-Net",
    "net.vnet_sdf.": "the two-headed V-Net of DTC",
    "net.hier_vnet.": "the hierarchical V-Net, whose heads URPC needs",
    "net.hier_unet3d.": "the 3D U-Net with deep supervision",
    "net.vnet_mtpd.": "the V-Net that shows its features to CPCL and ACMT",
}
CASES = sorted({key.split(".")[0] for key in book.arrays if key.endswith(".base.label")})
ACMT_CASES = [case for case in CASES if book.has(f"{case}.acmt_ent.loss")]
WAITING = {f"{case}.{group}.": words for case in CASES for group, words in ISSUE_5.items()} | ISSUE_5_SHARED
WAITING |= {f"{case}.acmt.teacher_logits_clean": "clean teacher pass of prototype error" for case in CASES}
for prefix, words in WAITING.items():
    if book.keys(prefix):
        book.allow(prefix, f"{words}: issue 5")

#: the official loops ramp over epochs of 150 iterations at any length of training
OFFICIAL = {"epoch_steps": 150}


class Stored(nn.Module):
    """Returns stored logits, whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, image: Tensor) -> Tensor:
        return self.logits


def take(key: str) -> Tensor:
    return torch.from_numpy(np.asarray(book.take(key)))


def method(name: str, num_classes: int, *logits: Tensor, **options: Any) -> SSLMethod:
    """The plug-in ``name`` whose networks are made of ``logits``, student first."""
    networks = iter([Stored(stored) for stored in logits])
    plugin: type[SSLMethod] = registry.load("ssl", name)
    made = plugin(lambda: next(networks), num_classes, plugin.Config(**options))
    return made.train()


def batch_of(case: str, labelled: int | None = None) -> Batch:
    count = int(take(f"{case}.base.labeled_bs")) if labelled is None else labelled
    return Batch(take(f"{case}.base.volume"), take(f"{case}.base.label")[:count].to(torch.uint8))


def progress_at(step: int, total: int) -> Progress:
    return Progress(step, total, phase_step=step, phase_total=total)


def close(actual: Tensor | float, key: str) -> None:
    """A scalar within 2e-5 of what the file holds."""
    assert float(actual) == pytest.approx(float(book.take(key)), rel=2e-5)


def gradient_close(network: nn.Module, output: StepOutput, key: str, extra: Tensor | float = 0.0) -> None:
    """The gradient of the total loss in the stored logits, within 1e-4 of the largest magnitude."""
    expected = take(key)
    (torch.stack(list(output.losses.values())).sum() + extra).backward()
    assert isinstance(network, Stored)
    assert network.logits.grad is not None
    assert (network.logits.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


def total(output: StepOutput) -> Tensor:
    return torch.stack(list(output.losses.values())).sum().detach()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("group", "loss"), [("sup_vnet", "ce_foreground_dice"), ("sup_unet", "ce_dice")])
def test_supervised(case: str, group: str, loss: str) -> None:
    logits = take(f"{case}.base.student_logits")
    bound = method("supervised", logits.shape[1], logits, loss=loss)
    output = bound.step(batch_of(case, labelled=len(logits)), progress_at(0, 1))
    close(output.losses["supervised"].detach(), f"{case}.{group}.loss")
    gradient_close(bound.predictor(), output, f"{case}.{group}.grad_logits")


@pytest.mark.parametrize("case", CASES)
def test_mean_teacher_of_ssl4mis(case: str) -> None:
    batch, step = batch_of(case), int(take(f"{case}.base.iter_num"))
    student, teacher = take(f"{case}.base.student_logits"), take(f"{case}.base.teacher_logits")
    mt = method("mt", student.shape[1], student, teacher[batch.labelled :], form="ssl4mis", **OFFICIAL)
    output = mt.step(batch, progress_at(step, int(take(f"{case}.base.max_iterations"))))
    weight = float(book.take(f"{case}.mt.consistency_weight"))
    close(output.losses["supervised"].detach(), f"{case}.mt.supervised_loss")
    close(output.losses["consistency"].detach() / weight, f"{case}.mt.consistency_loss")
    close(total(output), f"{case}.mt.loss")
    gradient_close(mt.predictor(), output, f"{case}.mt.grad_student_logits")


@pytest.mark.parametrize("case", CASES)
def test_mean_teacher_of_cfr_with_its_guidance(case: str) -> None:
    batch, step = batch_of(case), int(take(f"{case}.base.iter_num"))
    student, teacher = take(f"{case}.base.student_logits"), take(f"{case}.base.teacher_logits")
    mt = method("mt", student.shape[1], student, teacher, **OFFICIAL)
    output = mt.step(batch, progress_at(step, int(take(f"{case}.base.max_iterations"))))
    guidance = guidance_loss(output, take(f"{case}.cfr_mt.pseudo_label").to(torch.uint8), 1.0)
    consistency = output.losses["consistency"].detach()
    close(output.losses["supervised"].detach(), f"{case}.cfr_mt.loss_seg_l")
    close(guidance.detach(), f"{case}.cfr_mt.loss_seg_u")
    close(consistency / float(book.take(f"{case}.cfr_mt.consistency_weight")), f"{case}.cfr_mt.consistency_dist")
    close(consistency, f"{case}.cfr_mt.consistency_loss")
    close(total(output) + guidance.detach(), f"{case}.cfr_mt.loss_seg")
    gradient_close(mt.predictor(), output, f"{case}.cfr_mt.grad_student_logits", extra=guidance)


def ramp_total(step: int, threshold: float, start: float, stop: float) -> int:
    """The length of training that gives this threshold at this step: the file does not name ACMT's."""
    ramp = (threshold - start) / (stop - start)
    return round(step / (1.0 - math.sqrt(max(-math.log(ramp), 0.0) / 5.0)))


@pytest.mark.parametrize("case", ACMT_CASES)
@pytest.mark.parametrize("group", ["acmt_ent", "acmt_ent_late"])
def test_acmt_by_entropy(case: str, group: str) -> None:
    batch, step = batch_of(case), int(take(f"{case}.{group}.iter_num"))
    student, teacher = take(f"{case}.acmt.student_logits"), take(f"{case}.acmt.teacher_logits_noisy")
    acmt = method("acmt", student.shape[1], student, teacher, **OFFICIAL)
    options, threshold = acmt.config, float(book.take(f"{case}.{group}.threshold"))
    length = ramp_total(step, threshold, options.threshold_start, options.threshold_stop)
    ramped = threshold_rampup(step, length, options.threshold_start, options.threshold_stop)
    assert ramped == pytest.approx(threshold, rel=1e-9)
    output = acmt.step(batch, progress_at(step, length))
    mask, expected = output.masks["consistency"], take(f"{case}.{group}.mask").bool()
    assert torch.equal(mask.expand_as(expected), expected)
    assert torch.equal(take(f"{case}.{group}.entropy_map") >= threshold, expected[:, 0])
    close(output.losses["supervised"].detach(), f"{case}.{group}.supervised_loss")
    weight = float(book.take(f"{case}.{group}.consistency_weight"))
    close(output.losses["consistency"].detach() / weight, f"{case}.{group}.consistency_loss")
    close(total(output), f"{case}.{group}.loss")
    if book.has(f"{case}.{group}.loss_with_cfr_pseudo_term_derived"):
        # A sum of two numbers of the file: its guidance term is that of the base logits, not of these.
        base = StepOutput({}, guided=(take(f"{case}.base.student_logits")[batch.labelled :],))
        guidance = guidance_loss(base, take(f"{case}.cfr_mt.pseudo_label").to(torch.uint8), 1.0)
        close(total(output) + guidance, f"{case}.{group}.loss_with_cfr_pseudo_term_derived")
    gradient_close(acmt.predictor(), output, f"{case}.{group}.grad_student_logits")


def filled(network: nn.Module, seed: int) -> float:
    """Fill parameters by the rule of the golden description; return the sum of magnitudes."""
    rng, magnitude = np.random.RandomState(seed), 0.0
    for name, parameter in network.named_parameters():
        draw = rng.standard_normal(tuple(parameter.shape))
        if parameter.ndim > 1:
            draw *= math.sqrt(2.0 / math.prod(parameter.shape[1:]))
        else:
            draw = 1.0 + 0.1 * draw if name.endswith("weight") else 0.1 * draw
        parameter.data.copy_(torch.from_numpy(draw.astype(np.float32)))
        magnitude += float(np.abs(draw).sum())
    return magnitude


def test_vnet() -> None:
    image, classes = take("net.input"), int(take("net.n_classes"))
    names, shapes = list(book.take("net.vnet.param_names")), list(book.take("net.vnet.param_shapes"))
    width = int(shapes[0].split("x")[0])
    plugin = registry.load("net", "vnet")
    network = plugin(plugin.Config(width=width)).build(image.shape[1], classes)
    parameters = dict(network.named_parameters())
    assert list(parameters) == names
    assert ["x".join(map(str, p.shape)) for p in parameters.values()] == shapes
    assert sum(p.numel() for p in parameters.values()) == int(take("net.vnet.param_count"))
    assert filled(network, int(take("net.fill_seed"))) == pytest.approx(float(take("net.vnet.fill_abs_sum")), rel=1e-6)
    first = parameters[names[0]].detach().flatten()[:5]
    assert torch.equal(first, take("net.vnet.first_weight_5"))
    with torch.no_grad():
        logits = network.eval()(image)
    torch.testing.assert_close(logits, take("net.vnet.out"), rtol=0, atol=1e-4)
    assert float(logits.mean()) == pytest.approx(float(take("net.vnet.out_mean")), abs=1e-5)
    assert float(logits.abs().mean()) == pytest.approx(float(take("net.vnet.out_absmean")), abs=1e-5)
