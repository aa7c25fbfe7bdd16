"""CPS, cross pseudo supervision: two networks label unlabelled crops for each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, class_map, cross_entropy
from cfrbench.teachers import ConsistencyOptions


class CPS(SSLMethod):
    """Two networks of one architecture and two initialisations; each learns the other's hard labels."""

    name = "cps"
    title = "CPS"
    reference = (
        "Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021; "
        "HiLab-git/SSL4MIS code/train_cross_pseudo_supervision_3D.py"
    )
    formulas: ClassVar = {
        "supervised": "sum over k of 0.5 (CE(z_k,l, y) + Dice(p_k,l, y))",
        "pseudo-supervision": "w(t) (CE(z_1,u, argmax z_2,u) + CE(z_2,u, argmax z_1,u))",
    }
    differences = (
        "The paper labels the labelled crops too (crops 'all') and may cut and mix images; the official 3D script "
        "does neither.",
        "The official script starts one network Kaiming-normal and the other Xavier-normal (initialisation "
        "'original'). By default both start as the segmenter does, so the tested one starts like that of every method.",
        "The official script saves both networks and its test script reads a file neither writes: the first is tested.",
        "Officially the ramp takes 200 epochs of 150 steps on BraTS (N = 30000, poly-b).",
    )
    configs: ClassVar = {"original": {"ramp_length": 200, "epoch_steps": 150, "initialisation": "original"}}

    class Config(ConsistencyOptions):
        """Officially there is a cross-entropy, no Dice and no threshold."""

        crops: Literal["unlabelled", "all"] = Field(
            "unlabelled", description="crops on which the networks teach each other"
        )
        initialisation: Literal["segmenter", "original"] = Field(
            "segmenter", description="initial weights: the segmenter's, or Kaiming and Xavier"
        )
        tested: Literal["first", "second"] = Field("first", description="network that is tested")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.first = make_net()
        self.second = make_net()
        if self.config.initialisation == "original":
            for network, start in ((self.first, nn.init.kaiming_normal_), (self.second, nn.init.xavier_normal_)):
                for module in network.modules():
                    if isinstance(module, nn.Conv3d):  # transposed ones and biases keep PyTorch's default
                        start(module.weight)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """Both networks see the same crops."""
        known = batch.labelled
        first, second = self.first(batch.image), self.second(batch.image)
        begin = 0 if self.config.crops == "all" else known
        one, two = first[begin:], second[begin:]
        crossed = cross_entropy(one, class_map(two.detach())) + cross_entropy(two, class_map(one.detach()))
        losses = {
            "supervised": ce_dice(first[:known], batch.label) + ce_dice(second[:known], batch.label),
            "pseudo-supervision": self.config.weight(progress) * crossed,
        }
        return StepOutput(losses, guided=(first[known:], second[known:]))

    def predictor(self) -> nn.Module:
        """The first network, unless the second is asked for."""
        return self.first if self.config.tested == "first" else self.second


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """CPS."""
    return [CPS]
