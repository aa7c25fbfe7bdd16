"""UniMatch in 3D: its views, its streams, and its losses against plain spellings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cfrbench.contracts import SSLMethod
from cfrbench.errors import ConfigError
from cfrbench.losses import ce_dice
from cfrbench.testing import check_ssl
from cfrbench_ssl.unimatch_3d import UniMatch3D
from tests.ssl.spy import C, L, Spy, U, crops, halfway

PLAIN = {"strength": 0.0, "boxes": 0, "feature_dropout": 0.0, "threshold": 0.8}


def made(num_classes: int = C, **options: Any) -> Any:
    """The method on spies that range from unsure to sure."""
    torch.manual_seed(0)
    method: SSLMethod = UniMatch3D(lambda: Spy(num_classes), num_classes, UniMatch3D.Config(**options))
    spy: Any = method.predictor()
    spy.conv.weight.data.mul_(8.0)
    return method.train()


def masked_entropy(logits: Tensor, weak: Tensor, threshold: float) -> Tensor:
    """The paper's: a mean over all voxels, those below the threshold counting 0."""
    best, label = weak.detach().softmax(1).max(1)
    assert 0 < float((best >= threshold).float().mean()) < 1
    return (F.cross_entropy(logits, label, reduction="none") * (best >= threshold)).mean()


@pytest.mark.parametrize("options", [{"loss": "ce_dice", "threshold": 0.8}, {"boxes": 0, "feature_dropout": 0.2}])
def test_laws_in_other_forms(options: dict[str, Any]) -> None:
    check_ssl(UniMatch3D, UniMatch3D.Config(**options), num_classes=4)


def test_views() -> None:
    """One pass: labelled crops, weak views, and two different strong views; the weak ones are guided."""
    method, batch = made(), crops()
    output = method.step(batch, halfway())
    ((shown, training, grad),) = method.net.calls
    assert training
    assert grad
    assert torch.equal(shown[: L + U], batch.image)
    one, two = shown[L + U :].chunk(2)
    assert len(one) == U
    for view in (one, two):
        assert not torch.allclose(view, batch.image[L:])
    assert not torch.allclose(one, two)
    torch.testing.assert_close(output.guided[0], method.net.conv(batch.image[L:]))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_losses_without_any_disturbance(num_classes: int) -> None:
    batch = crops(num_classes)
    method = made(num_classes, **PLAIN, weight=3.0, strong_weight=0.4, feature_weight=0.7)
    losses = method.step(batch, halfway()).losses
    known, weak = method.net.conv(batch.image).tensor_split([L])
    pseudo = masked_entropy(weak, weak, 0.8)
    torch.testing.assert_close(losses["supervised"], 0.5 * ce_dice(known, batch.label))
    torch.testing.assert_close(losses["strong-views"], 0.5 * 3.0 * 0.4 * pseudo)
    torch.testing.assert_close(losses["feature-dropout"], 0.5 * 3.0 * 0.7 * pseudo)


def test_each_stream_learns_the_labels_of_the_weak_view() -> None:
    method, batch = made(threshold=0.8, feature_dropout=0.0, boxes=1), crops()
    losses = method.step(batch, halfway()).losses
    ((shown, _, _),) = method.net.calls
    weak, one, two = method.net.conv(shown[L:]).chunk(3)
    strong = 0.5 * (masked_entropy(one, weak, 0.8) + masked_entropy(two, weak, 0.8))
    torch.testing.assert_close(losses["strong-views"], 0.25 * strong)
    torch.testing.assert_close(losses["feature-dropout"], 0.25 * masked_entropy(weak, weak, 0.8))


def test_features_are_dropped_by_whole_channels_for_the_weak_view_alone() -> None:
    method, batch = made(**{**PLAIN, "feature_dropout": 0.5}), crops(unlabelled=20)
    method.step(batch, halfway())
    seen: list[Tensor] = []
    method.net.conv.register_forward_hook(lambda module, features, logits: seen.append(features[0]))
    method.step(batch, halfway())
    clean, dropped = seen[0].split([L + 3 * 20, 20])
    assert torch.equal(clean[: L + 20], batch.image)
    kept = (dropped != 0).flatten(1).all(dim=1)
    torch.testing.assert_close(dropped, 2.0 * batch.image[L:] * kept.view(-1, 1, 1, 1, 1))
    assert 0 < int(kept.sum()) < 20


def test_the_medical_script_takes_dice_alone() -> None:
    batch, options = crops(), UniMatch3D.configs["medical"]
    losses = made(**PLAIN, **options).step(batch, halfway()).losses
    weak = made().net.conv(batch.image[L:])
    best, label = weak.softmax(1).max(1)
    sure, terms = best >= 0.8, []
    for name in range(C):
        score, mask = weak.softmax(1)[:, name][sure], (label[sure] == name).float()
        terms.append(1 - (2 * (score * mask).sum() + 1e-5) / (score.square().sum() + mask.sum() + 1e-5))
    torch.testing.assert_close(losses["feature-dropout"], 0.25 * torch.stack(terms).mean())


def test_a_network_without_an_encoder_to_show_is_refused() -> None:
    with pytest.raises(ConfigError, match="unimatch-3d"):
        UniMatch3D(lambda: torch.nn.Conv3d(1, 2, 1), 2)
