"""CauSSL: co-trained branches agree on unlabelled crops while their filters are kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.decoders import SharedEncoder, mixed_then_raised
from cfrbench.hookspecs import hookimpl
from cfrbench.independence import Mixture
from cfrbench.losses import class_map, cross_entropy, mean_foreground_dice_loss, mutual_distances, sharpened
from cfrbench.teachers import ConsistencyOptions

#: whose filters mix into those of each branch, in the official order of rows
COMPANIONS = {"mc": ((1, 2), (0, 2), (1, 0)), "cps": ((1,), (0,))}
#: the share of a run after which the term on independence begins: 40 and 500 of 6000 iterations
BEGINS = {"mc": 150, "cps": 12}


def convolution_weights(network: nn.Module) -> list[Tensor]:
    """The weights of every 3D convolution, strided and transposed ones and the classifier too."""
    return [parameter for parameter in network.parameters() if parameter.ndim == 5]


class CauSSL(SSLMethod):
    """Three decoders of one encoder, or two networks; every hundredth of a run the mix of filters is sought anew."""

    name = "caussl"
    title = "CauSSL"
    reference = (
        "Miao et al., CauSSL: causality-inspired semi-supervised learning for medical image segmentation, ICCV 2023; "
        "JuzhengMiao/CauSSL train_CT_MCCauSSL.py, train_CT_CPSCauSSL.py"
    )
    formulas: ClassVar = {
        "supervised": "sum over the K branches k of 0.5 (CE(z_k,l, y) + mean over foreground classes of Dice)",
        "consistency": "form mc: w(t) sum over pairs j != k of mean((p_k,u - sharp(p_j,u))^2), "
        "sharp(p) = p^(1/T) / sum_c p^(1/T) fixed",
        "pseudo-supervision": "form cps: 0.3 w(t) sum over k of CE(z_k,u, argmax z_j,u), j the other network",
        "independence": "independence sum over k of m_k, m_k = mean over layers and filters f of cos^2(f, (A R)_f), "
        "R the same layer's filters of the other branches, fixed; A raises m_k by search_steps of Adam at a time",
    }
    differences = (
        "CFR's rows and the default are the MC form: one encoder whose decoders step up by transposed convolution, or "
        "a 1x1x1 convolution and then trilinear or nearest. Only scripts for another data set are public.",
        "In the official MC code m_2 and m_3 reach no network, because their decoders are read detached: it keeps "
        "decoder 1 apart only (penalised 'first'). The paper means all of them, which is the default.",
        "The official decoders carry two bottleneck blocks that nothing reads; they are left out: 12,983,526 "
        "parameters instead of 23,604,966.",
        "Official code is for two classes; for more, its Dice term is averaged over the foreground classes.",
        "The iterations at which terms begin and A is sought are those of a run of 6000, scaled to its length; the "
        "configs 'original' and 'original-cps' give the numbers of the code (the MC script stops at 5001).",
        "In the CPS form the official code updates the first network before the second's backward pass, which current "
        "PyTorch refuses; the gradients are the same. It reports both networks: here the first, or the one tested.",
        "On the 3D U-Net, which has no transposed convolutions, the decoders differ in their weights alone.",
    )
    configs: ClassVar = {
        "original": {"epoch_steps": 150, "penalised": "first", "begin": 40, "every": 60},
        "original-cps": {"form": "cps", "epoch_steps": 150, "begin": 500, "begin_cross": 400, "every": 60},
    }

    class Config(ConsistencyOptions):
        """The values of the official scripts."""

        form: Literal["mc", "cps"] = Field("mc", description="branches: three decoders of one encoder, or two networks")
        temperature: float = Field(0.5, gt=0, description="form mc: T that sharpens the other decoders' softmax")
        cross_weight: float = Field(0.3, ge=0, description="form cps: weight of the other network's labels, times w(t)")
        begin_cross: int | None = Field(
            None, ge=0, description="form cps: iteration after which they are learnt; None = a 15th of the run"
        )
        independence: float = Field(3.0, ge=0, description="weight of the term that keeps filters apart")
        penalised: Literal["all", "first"] = Field("all", description="form mc: decoders that it moves")
        begin: int | None = Field(
            None, ge=0, description="iteration after which A is sought; None = a 150th of the run (mc), a 12th (cps)"
        )
        every: int | None = Field(None, ge=1, description="iterations between two searches; None = a 100th of the run")
        search_steps: int = Field(60, ge=1, description="steps of Adam in one search")
        search_rate: float = Field(0.02, gt=0, description="their learning rate")
        tested: Literal["first", "second"] = Field("first", description="form cps: network that is tested")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        steps_up = (mixed_then_raised("trilinear"), mixed_then_raised("nearest"))
        mc = self.config.form == "mc"
        self.shared = SharedEncoder(make_net, self.name, steps_up) if mc else None
        self.networks = nn.ModuleList() if mc else nn.ModuleList([make_net(), make_net()])
        measured = COMPANIONS[self.config.form][: 1 if mc and self.config.penalised == "first" else None]
        self.mixtures = nn.ModuleList(
            Mixture([(len(layer), len(layer) * len(companions)) for layer in self._filters()[0]])
            for companions in measured
        )

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """All branches see the same crops; the search, if it is due, comes first."""
        begin, every = self._rhythm(progress)
        filters = self._filters()
        if progress.step > begin and progress.step % every == 0 and progress.part == 0:
            for mixture, own, rows in self._measured(filters):
                mixture.search(own, rows, self.config.search_steps, self.config.search_rate)
        logits = [values.float() for values in self._logits(batch.image)]
        unknown = tuple(values[batch.labelled :] for values in logits)
        known = [values[: batch.labelled] for values in logits]
        losses = {"supervised": torch.stack([self._taught(values, batch.label) for values in known]).sum()}
        losses |= self._agreement(unknown, progress)
        if progress.step >= (begin // every + 1) * every:  # the first search
            measures = torch.stack([mixture.dependence(own, rows) for mixture, own, rows in self._measured(filters)])
            losses["independence"] = self.config.independence * measures.sum()
        return StepOutput(losses, guided=unknown)

    def _rhythm(self, progress: Progress) -> tuple[int, int]:
        """The iteration after which A is sought, and how many lie between two searches."""
        begin, every = self.config.begin, self.config.every
        begin = progress.total // BEGINS[self.config.form] if begin is None else begin
        return begin, max(1, progress.total // 100) if every is None else every

    def _logits(self, image: Tensor) -> list[Tensor]:
        return self.shared(image) if self.shared else [network(image) for network in self.networks]

    def _filters(self) -> list[list[Tensor]]:
        """By branch and layer."""
        return self.shared.filters() if self.shared else [convolution_weights(network) for network in self.networks]

    def _measured(self, filters: Sequence[Sequence[Tensor]]) -> list[tuple[Mixture, Sequence[Tensor], list[Tensor]]]:
        """Of each branch that is kept apart: its mixture, its filters and its companions' by layer."""
        found = []
        for mixture, own, companions in zip(self.mixtures, filters, COMPANIONS[self.config.form], strict=False):
            layers = zip(*(filters[index] for index in companions), strict=True)
            assert isinstance(mixture, Mixture)
            found.append((mixture, own, [torch.cat(layer).detach() for layer in layers]))
        return found

    def _taught(self, logits: Tensor, label: Tensor) -> Tensor:
        return 0.5 * (cross_entropy(logits, label) + mean_foreground_dice_loss(logits.softmax(dim=1), label))

    def _agreement(self, unknown: Sequence[Tensor], progress: Progress) -> dict[str, Tensor]:
        weight = self.config.weight(progress)
        if self.shared:
            targets = [sharpened(logits.detach(), self.config.temperature) for logits in unknown]
            distances = mutual_distances([logits.softmax(dim=1) for logits in unknown], targets)
            return {"consistency": weight * distances.sum()}
        begin = progress.total // 15 if self.config.begin_cross is None else self.config.begin_cross
        if progress.step <= begin:
            return {}
        first, second = unknown
        labels = [class_map(logits.detach()) for logits in unknown]
        crossed = cross_entropy(first, labels[1]) + cross_entropy(second, labels[0])
        return {"pseudo-supervision": self.config.cross_weight * weight * crossed}

    def predictor(self) -> nn.Module:
        """The encoder with its first decoder, or the network that is tested."""
        if self.shared:
            return self.shared.net
        return self.networks[0 if self.config.tested == "first" else 1]


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """CauSSL."""
    return [CauSSL]
