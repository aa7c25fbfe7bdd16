"""Only what belongs to single classes trains: the mask tokens and the heads that turn them into pixel classifiers."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from cfrbench.config import Frozen
from cfrbench.contracts import FineTuner, Promptable, Published
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import freeze
from cfrbench.tuners import NamedTuner, train_only, trainable


class LinearProbe(NamedTuner):
    """The least that can be learned: each class is a linear map of frozen pixel features, and only that map trains.

    SAM's decoder makes the map's coefficients from a mask token of the class by a small head (hypernetwork). Ours, not
    in the paper: the least that the other fine-tuners should beat.
    """

    name = "linear-probe"
    published = (Published("linear probe, 1 class"), Published("mask tokens alone, 1 class", {"heads": False}))

    class Config(Frozen):
        """What of a class trains."""

        heads: bool = Field(True, description="train the hypernetwork heads too; False = the mask tokens alone")

    config: Config

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Freeze all but mask tokens and hypernetworks."""
        freeze(model)
        train_only(model.mask_decoder, "mask_tokens", *(["output_hypernetworks_mlps"] if self.config.heads else []))
        return trainable(model)


@hookimpl
def fine_tuners() -> list[type[FineTuner]]:
    """The linear probe."""
    return [LinearProbe]
