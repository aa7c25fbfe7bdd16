"""The methods with heads inside the network, CCT, URPC and DTC, against what the official statements gave."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from cfrbench.contracts import Batch
from cfrbench.distance_maps import signed_distance_maps
from cfrbench.perturbations import drop_most_active, scale_features
from cfrbench_ssl.dtc import AgainstZero
from cfrbench_ssl.urpc import mean_and_divergences, rectified_distances
from tests.golden.ssl_cases import (
    CASES,
    OFFICIAL,
    Stored,
    StoredBackbone,
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


def head_logits(case: str) -> list[torch.Tensor]:
    """The main head and the auxiliary ones."""
    keys = sorted(key for key in book.keys(f"{case}.heads.aux") if re.search(r"aux\d+_logits$", key))
    assert keys
    return [take(f"{case}.base.student_logits"), *map(take, keys)]


@pytest.mark.parametrize("case", CASES)
def test_cct(case: str) -> None:
    batch, progress, logits = batch_of(case), progress_of(case), head_logits(case)
    cct: Any = method("cct", logits[0].shape[1], *map(StoredBackbone, logits), **OFFICIAL)
    output = cct.step(batch, progress)
    weight = cct.config.weight(progress)
    close(output.losses["supervised"], f"{case}.cct.supervised_loss")
    close(output.losses["consistency"] / weight, f"{case}.cct.consistency_loss")
    close(weight, f"{case}.cct.consistency_weight")
    close(total(output), f"{case}.cct.loss")
    decoders = [cct.net, *cct.auxiliary]
    assert len(decoders) == len(logits)
    gradients_close(output, {f"{case}.cct.grad_head{i}": net.out_conv for i, net in enumerate(decoders)})


def test_feature_perturbations() -> None:
    feature = take("cct_pert.feature2d")
    map_close(drop_most_active(feature, float(book.take("cct_pert.uniform_draw"))), "cct_pert.feature_dropout2d")
    map_close(scale_features(feature, take("cct_pert.noise_vector")), "cct_pert.feature_noise2d")


@pytest.mark.parametrize("case", CASES)
def test_urpc(case: str) -> None:
    batch, progress, logits = batch_of(case), progress_of(case), head_logits(case)
    urpc: Any = method("urpc", logits[0].shape[1], StoredBackbone(logits[0]), scales=len(logits), **OFFICIAL)
    main, *others = [urpc.net.out_conv, *map(Stored, logits[1:])]
    assert len(urpc.heads) == len(others)
    urpc.heads = nn.ModuleList(reversed(others))
    output = urpc.step(batch, progress)
    weight, key = urpc.config.weight(progress), f"{case}.urpc"
    close(output.losses["supervised"], f"{key}.supervised_loss")
    close(output.losses["consistency"] / weight, f"{key}.consistency_loss")
    close(weight, f"{key}.consistency_weight")
    close(total(output), f"{key}.loss")
    unlabelled = [head[batch.labelled :] for head in logits]
    for index, value in enumerate(rectified_distances(unlabelled), start=1):
        close(value, f"{key}.consistency_loss_aux{index}")
    for index, divergence in enumerate(mean_and_divergences(unlabelled)[2]):
        map_close(divergence, f"{key}.variance_{index}")
    map_close(mean_and_divergences(logits)[1], f"{key}.mean_prob")
    gradients_close(output, {f"{key}.grad_head{i}": head for i, head in enumerate([main, *others])})


@pytest.mark.parametrize("case", [case for case, _ in cases_of("dtc")])
def test_dtc(case: str) -> None:
    progress, known = progress_of(case), int(take(f"{case}.base.labeled_bs"))
    batch = Batch(take(f"{case}.base.volume"), take(f"{case}.dtc.label")[:known].to(torch.uint8))
    level_set, logit = take(f"{case}.dtc.tanh_output"), take(f"{case}.dtc.seg_logits")
    dtc: Any = method("dtc", 2, StoredBackbone(logit), **OFFICIAL)
    dtc.net.out_conv = nn.Sequential(Stored(logit), AgainstZero())
    dtc.level_set = Stored(level_set)
    output = dtc.step(batch, progress)
    weight, key, losses = dtc.config.weight(progress), f"{case}.dtc", output.losses
    assert torch.equal(take(f"{key}.label") > 0, take(f"{case}.base.label") > 0)
    map_close(dtc._distances(batch.label)[:, 0], f"{key}.gt_dis")
    map_close(dtc._masks(level_set), f"{key}.dis_to_mask")
    close(losses["level-set"] / dtc.config.beta, f"{key}.loss_sdf")
    close(losses["dice"], f"{key}.loss_seg_dice")
    close(losses["dice"] + losses["level-set"], f"{key}.supervised_loss")
    close(losses["consistency"] / weight, f"{key}.consistency_loss")
    close(weight, f"{key}.consistency_weight")
    close(total(output), f"{key}.loss")
    gradients_close(output, {f"{key}.grad_tanh_output": dtc.level_set, f"{key}.grad_seg_logits": dtc.net.out_conv[0]})
    logged = method("dtc", 2, StoredBackbone(logit), ce_weight=1.0)
    logged.net.out_conv = dtc.net.out_conv
    logged.level_set = dtc.level_set
    close(logged.step(batch, progress).losses["cross-entropy"], f"{key}.loss_seg")


@pytest.mark.parametrize("case", [case for case in CASES if book.has(f"{case}.sdf.masks")])
def test_signed_distance_maps(case: str) -> None:
    map_close(signed_distance_maps(take(f"{case}.sdf.masks").bool()), f"{case}.sdf.output")
