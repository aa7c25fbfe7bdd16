"""SSL plug-ins against what the official statements gave (``ssl_consistency.npz``); their networks are stand-ins."""

from __future__ import annotations

import pytest
import torch

from cfrbench.contracts import StepOutput
from cfrbench.guidance import guidance_loss
from cfrbench.schedules import threshold_rampup
from tests.golden.ssl_cases import (
    CASES,
    OFFICIAL,
    batch_of,
    book,
    close,
    gradients_close,
    method,
    progress_at,
    progress_of,
    ramp_total,
    take,
    total,
)

ACMT_CASES = [case for case in CASES if book.has(f"{case}.acmt_ent.loss")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("group", "loss"), [("sup_vnet", "ce_foreground_dice"), ("sup_unet", "ce_dice")])
def test_supervised(case: str, group: str, loss: str) -> None:
    logits = take(f"{case}.base.student_logits")
    bound = method("supervised", logits.shape[1], logits, loss=loss)
    output = bound.step(batch_of(case, labelled=len(logits)), progress_at(0, 1))
    close(output.losses["supervised"].detach(), f"{case}.{group}.loss")
    gradients_close(output, {f"{case}.{group}.grad_logits": bound.predictor()})


@pytest.mark.parametrize("case", CASES)
def test_mean_teacher_of_ssl4mis(case: str) -> None:
    batch = batch_of(case)
    student, teacher = take(f"{case}.base.student_logits"), take(f"{case}.base.teacher_logits")
    mt = method("mt", student.shape[1], student, teacher[batch.labelled :], form="ssl4mis", **OFFICIAL)
    output = mt.step(batch, progress_of(case))
    weight = float(book.take(f"{case}.mt.consistency_weight"))
    close(output.losses["supervised"].detach(), f"{case}.mt.supervised_loss")
    close(output.losses["consistency"].detach() / weight, f"{case}.mt.consistency_loss")
    close(total(output), f"{case}.mt.loss")
    gradients_close(output, {f"{case}.mt.grad_student_logits": mt.predictor()})


@pytest.mark.parametrize("case", CASES)
def test_mean_teacher_of_cfr_with_its_guidance(case: str) -> None:
    batch = batch_of(case)
    student, teacher = take(f"{case}.base.student_logits"), take(f"{case}.base.teacher_logits")
    mt = method("mt", student.shape[1], student, teacher, **OFFICIAL)
    output = mt.step(batch, progress_of(case))
    guidance = guidance_loss(output, take(f"{case}.cfr_mt.pseudo_label").to(torch.uint8), 1.0)
    consistency = output.losses["consistency"].detach()
    close(output.losses["supervised"].detach(), f"{case}.cfr_mt.loss_seg_l")
    close(guidance.detach(), f"{case}.cfr_mt.loss_seg_u")
    close(consistency / float(book.take(f"{case}.cfr_mt.consistency_weight")), f"{case}.cfr_mt.consistency_dist")
    close(consistency, f"{case}.cfr_mt.consistency_loss")
    close(total(output) + guidance.detach(), f"{case}.cfr_mt.loss_seg")
    gradients_close(output, {f"{case}.cfr_mt.grad_student_logits": mt.predictor()}, extra=guidance)


@pytest.mark.parametrize("case", ACMT_CASES)
@pytest.mark.parametrize("group", ["acmt_ent", "acmt_ent_late"])
def test_acmt_by_entropy(case: str, group: str) -> None:
    batch, step = batch_of(case), int(take(f"{case}.{group}.iter_num"))
    student, teacher = take(f"{case}.acmt.student_logits"), take(f"{case}.acmt.teacher_logits_noisy")
    acmt = method("acmt", student.shape[1], student, teacher, **OFFICIAL)
    threshold = float(book.take(f"{case}.{group}.threshold"))
    length = ramp_total(step, threshold, 0.75, 0.95)
    ramped = threshold_rampup(step, length, 0.75, 0.95)
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
    gradients_close(output, {f"{case}.{group}.grad_student_logits": acmt.predictor()})
