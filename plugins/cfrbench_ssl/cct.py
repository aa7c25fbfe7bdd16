"""CCT, cross-consistency training: decoders that read disturbed features agree with one that reads clean ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench.backbone import Backbone, make_backbone
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, softmax_mse
from cfrbench.perturbations import drop_most_active, scale_features
from cfrbench.teachers import ConsistencyOptions, noisy

Perturbation = Callable[[Tensor], Tensor]


def _feature_noise(features: Tensor) -> Tensor:
    return scale_features(features, torch.empty_like(features[0]).uniform_(-0.3, 0.3))


def _feature_dropout(features: Tensor) -> Tensor:
    return drop_most_active(features, torch.empty((), device=features.device).uniform_(0.7, 0.9))


def _dropout(features: Tensor, rate: float) -> Tensor:
    return F.dropout(features, rate)


#: one auxiliary decoder each, applied to the features of every level, the skips too
PERTURBATIONS: Mapping[str, Sequence[Perturbation]] = {
    "ssl4mis": (_feature_noise, partial(_dropout, rate=0.3), _feature_dropout),
    "cpcl": (partial(noisy, std=0.1, clip=0.3), partial(_dropout, rate=0.5), partial(noisy, std=0.1, clip=0.5)),
}


class CCT(SSLMethod):
    """One encoder, a main decoder, and an auxiliary decoder for each way to disturb the features."""

    name = "cct"
    title = "CCT"
    reference = (
        "Ouali et al., Semi-supervised semantic segmentation with cross-consistency training, CVPR 2020; "
        "HiLab-git/SSL4MIS code/train_cross_consistency_training_2D.py, in 3D"
    )
    formulas: ClassVar = {
        "supervised": "mean over the main and K auxiliary decoders k of 0.5 (CE(z_k,l, y) + Dice(p_k,l, y))",
        "consistency": "w(t) mean over the auxiliary decoders k of mean((p_0,u - p_k,u)^2)",
    }
    differences = (
        "No official 3D training code exists: this is the 2D script of SSL4MIS with 3D features.",
        "lemoshu/CPCL code/networks/vnet.py has a 3D form without a script: one decoder read four times (decoders "
        "'shared') and Gaussian noise (perturbations 'cpcl').",
        "The paper teaches the main decoder alone with labels (supervised_decoders 'main') and does not let the "
        "auxiliary ones move it (detach_target); SSL4MIS does both.",
        "Officially the ramp takes 200 epochs of 150 steps (N = 30000, poly-a).",
    )
    configs: ClassVar = {"original": {"ramp_length": 200, "epoch_steps": 150}}

    class Config(ConsistencyOptions):
        """The number of auxiliary decoders is that of the perturbations, three in both sets."""

        decoders: Literal["separate", "shared"] = Field(
            "separate", description="weights of the auxiliary decoders: their own, or the main one's"
        )
        perturbations: Literal["ssl4mis", "cpcl"] = Field("ssl4mis", description="whose three ways to disturb features")
        supervised_decoders: Literal["all", "main"] = Field("all", description="decoders that learn labels")
        detach_target: bool = Field(False, description="give the main decoder no gradient from the consistency loss")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.net = make_backbone(make_net, self.name)
        self._perturbations = PERTURBATIONS[self.config.perturbations]
        separate = self.config.decoders == "separate"
        self.auxiliary = nn.ModuleList(self._decoder(make_net) for _ in self._perturbations if separate)

    def _decoder(self, make_net: Callable[[], nn.Module]) -> Backbone:
        decoder = make_backbone(make_net, self.name)
        decoder.remove_encoder()
        return decoder

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One pass through the encoder, one through each decoder; gradients reach the encoder through all of them."""
        main, *others = self._heads(batch.image)
        known = batch.labelled
        taught = [main] if self.config.supervised_decoders == "main" else [main, *others]
        target = main[known:].detach() if self.config.detach_target else main[known:]
        distances = torch.stack([softmax_mse(other[known:], target).mean() for other in others])
        losses = {
            "supervised": torch.stack([ce_dice(logits[:known], batch.label) for logits in taught]).mean(),
            "consistency": self.config.weight(progress) * distances.mean(),
        }
        return StepOutput(losses, guided=(main[known:],))

    def _heads(self, image: Tensor) -> list[Tensor]:
        """The logits of the main and of each auxiliary decoder."""
        features = self.net.encode(image)
        heads = [self.net.segment(features)]
        for index, perturb in enumerate(self._perturbations):
            decoder = self.auxiliary[index] if len(self.auxiliary) else self.net
            assert isinstance(decoder, Backbone)
            heads.append(decoder.segment([perturb(level) for level in features]))
        return heads

    def predictor(self) -> nn.Module:
        """The encoder and the main decoder."""
        return self.net


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """CCT."""
    return [CCT]
