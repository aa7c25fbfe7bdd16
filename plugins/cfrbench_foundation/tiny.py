"""A SAM of two blocks with made-up weights: the whole pipeline in seconds, through the code of the real one."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from cfrbench.config import Frozen
from cfrbench.contracts import FoundationModel, Promptable
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import DecoderShape, ViTShape, load_matching, vit_sam

VIT = ViTShape(width=32, depth=2, heads=2, global_blocks=(1,), window=2)
DECODER = DecoderShape(width=16, heads=2, mlp_width=32, iou_width=16, mask_channels=4)


class TinySam(FoundationModel):
    """One windowed and one global block; its numbers mean nothing."""

    name = "tiny"
    title = "tiny random SAM"
    licence = "Apache-2.0"
    origin = "made up from a seed"
    intensity = "bezier-rescaled"
    note = "The foundation model is a random toy: these rows check that everything runs and mean nothing else."
    encoder = "vit"

    class Config(Frozen):
        """Size and seed."""

        input_size: int = Field(64, ge=32, multiple_of=16, description="side of the encoder's image in pixels")
        seed: int = Field(0, ge=0, description="of the made-up checkpoint")

    config: Config

    @property
    def input_size(self) -> int:
        """64 unless set otherwise."""
        return self.config.input_size

    def architecture(self, num_classes: int) -> Promptable:
        """Return the model before its checkpoint is loaded."""
        return vit_sam(VIT, self.input_size, num_classes, DECODER)

    def build(self, num_classes: int) -> Promptable:
        """Return the model with the checkpoint that the seed stands for loaded as a real one would be."""
        model = self.architecture(num_classes)
        load_matching(model, self._checkpoint())
        return model

    def normalise(self, volumes: Tensor) -> Tensor:
        """Return z-scored crops as they are."""
        return volumes

    def identity(self) -> str:
        """The seed; the size is an option and stands in every key anyway."""
        return f"tiny-{self.config.seed}"

    def _checkpoint(self) -> dict[str, Tensor]:
        """A SAM with three multimask outputs, as released ones have; the caller's random stream is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            state: dict[str, Tensor] = vit_sam(VIT, self.input_size, 4, DECODER).state_dict()
            # Position tables start at zero; a checkpoint has learned ones.
            tables = [name for name in state if "rel_pos" in name or "pos_embed" in name]
            return state | {name: 0.1 * torch.randn_like(state[name]) for name in tables}


@hookimpl
def foundation_models() -> list[type[FoundationModel]]:
    """The toy."""
    return [TinySam]
