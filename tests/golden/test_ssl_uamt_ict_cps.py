"""UA-MT, ICT and CPS against what the official statements gave."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cfrbench.contracts import Batch
from cfrbench.losses import ce_dice, class_map, cross_entropy, entropy_map
from cfrbench.perturbations import mix
from cfrbench.schedules import threshold_rampup
from cfrbench.uncertainty import mean_probability
from tests.golden.ssl_cases import (
    CASES,
    OFFICIAL,
    StoredInTurn,
    batch_of,
    book,
    cases_of,
    close,
    gradients_close,
    map_close,
    method,
    progress_of,
    take,
    total,
)

#: crops and supervised loss of each group
UAMT: dict[str, dict[str, Any]] = {
    "uamt": {"loss": "ce_foreground_dice"},
    "uamt_all": {"loss": "ce_foreground_dice", "crops": "all"},
    "uamt_gen": {"loss": "ce_dice"},
}
#: what may be stored beside loss, mask and gradient; the original multiplies its consistency loss by the weight
MEASURES = ("uncertainty", "mean_prob", "threshold", "supervised_loss", "consistency_weight", "consistency_dist")


@pytest.mark.parametrize(("case", "group"), cases_of(*UAMT))
def test_uamt(case: str, group: str) -> None:
    batch, progress = batch_of(case), progress_of(case)
    student = take(f"{case}.base.student_logits")
    mc_logits = take(f"{case}.{'uamt' if group == 'uamt_gen' else group}.mc_logits")
    passes, crops, classes = mc_logits.shape[:3]
    first = len(batch.image) - crops
    target = take(f"{case}.base.teacher_logits")[first:]
    pairs = [mc_logits[i : i + 2].flatten(0, 1) for i in range(0, passes, 2)]
    teacher, options = StoredInTurn([target, *pairs]), {**UAMT[group], **OFFICIAL}
    uamt: Any = method("ua-mt", classes, student, teacher, passes=passes, **options)
    output = uamt.step(batch, progress)
    assert torch.equal(output.masks["consistency"], take(f"{case}.{group}.mask").bool())

    key, weight = f"{case}.{group}", uamt.config.weight(progress)
    threshold = threshold_rampup(progress.step, progress.total, 0.75, 1.0) * math.log(classes)
    mean = mean_probability(StoredInTurn(pairs), batch.image[first:], passes)
    distance = output.losses["consistency"] / weight
    ours = (entropy_map(mean, normalised=False), mean, threshold, output.losses["supervised"], weight, distance)
    for name, value in zip(MEASURES, ours, strict=True):
        if book.has(f"{key}.{name}"):
            (map_close if name in MEASURES[:2] else close)(value, f"{key}.{name}")
    if book.has(f"{key}.consistency_loss"):
        close(distance if group == "uamt_gen" else output.losses["consistency"], f"{key}.consistency_loss")
    close(total(output), f"{key}.loss")
    gradients_close(output, {f"{key}.grad_student_logits": uamt.student})


@pytest.mark.parametrize("case", CASES)
def test_ict(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, progress = batch_of(case), progress_of(case)
    share = take(f"{case}.ict.lam").reshape(-1)
    known, pairs = batch.labelled, len(share)
    teacher = take(f"{case}.base.teacher_logits")[known : known + 2 * pairs]
    answers = StoredInTurn([teacher[:pairs], teacher[pairs:]])
    student = take(f"{case}.base.student_logits")[: known + pairs]
    ict: Any = method("ict", student.shape[1], student, answers, **OFFICIAL)
    monkeypatch.setattr(ict, "_shares", lambda count: share[:count])
    output = ict.step(Batch(batch.image[: known + 2 * pairs], batch.label), progress)
    weight = ict.config.weight(progress)
    assert answers.calls == 2
    map_close(ict.student.seen, f"{case}.ict.student_input")
    map_close(mix(*teacher.softmax(1).chunk(2), share), f"{case}.ict.target_mixed_prob")
    close(output.losses["supervised"], f"{case}.ict.supervised_loss")
    close(output.losses["consistency"] / weight, f"{case}.ict.consistency_loss")
    close(weight, f"{case}.ict.consistency_weight")
    close(total(output), f"{case}.ict.loss")
    gradients_close(output, {f"{case}.ict.grad_student_logits": ict.student})


@pytest.mark.parametrize("case", CASES)
def test_cps(case: str) -> None:
    batch, progress = batch_of(case), progress_of(case)
    first, second = take(f"{case}.base.student_logits"), take(f"{case}.base.teacher_logits")
    cps: Any = method("cps", first.shape[1], first, second, **OFFICIAL)
    output = cps.step(batch, progress)
    weight, key = cps.config.weight(progress), f"{case}.cps"
    close(weight, f"{key}.consistency_weight")
    one, two = first[batch.labelled :], second[batch.labelled :]
    supervised = [ce_dice(logits[: batch.labelled], batch.label) for logits in (first, second)]
    crossed = [cross_entropy(one, class_map(two)), cross_entropy(two, class_map(one))]
    for index in range(2):
        close(supervised[index], f"{key}.loss{index + 1}")
        close(crossed[index], f"{key}.pseudo_supervision{index + 1}")
    torch.testing.assert_close(output.losses["supervised"].detach(), sum(supervised))
    torch.testing.assert_close(output.losses["pseudo-supervision"].detach(), weight * sum(crossed))
    close(total(output), f"{key}.loss")
    gradients_close(output, {f"{key}.grad_logits1": cps.first, f"{key}.grad_logits2": cps.second})
