"""MobileSAM (ChaoningZhang/MobileSAM): SAM's decoder behind a TinyViT that was taught to answer as ViT-H does."""

from __future__ import annotations

from torch import Tensor

from cfrbench.contracts import FoundationModel, Promptable
from cfrbench.hookspecs import hookimpl
from cfrbench.intensity import rescale_to_unit
from cfrbench.pretrained import Pretrained, Release
from cfrbench.promptable import mask_head, prompt_encoder, standardise_pixels
from cfrbench.weights import RELEASED

STRIDE = 16  # pixels per token of the embedding: the stem divides by 4, the stages by 4


class MobileSam(Pretrained):
    """9,808,452 parameters; the released file holds 321,640 more in a classification head that nothing uses.

    Only the bias inside each window depends on position, so the weights fit every input size.
    """

    name = "mobile-sam"
    title = "MobileSAM"
    kind = "MobileSAM"
    licence = "Apache-2.0"
    origin = "https://github.com/ChaoningZhang/MobileSAM/tree/master/weights"
    intensity = "gamma"
    encoder = "tiny-vit"
    release = Release(
        "mobile_sam.pt",
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        RELEASED[kind],
        megabytes=41,
    )

    def architecture(self, num_classes: int) -> Promptable:
        """The model with random weights."""
        from cfrbench_foundation.tiny_vit import TinyEncoder  # takes seconds; only who builds pays

        encoder = standardise_pixels(TinyEncoder(kernel=3, stride=2))
        prompts = prompt_encoder(self.input_size // STRIDE, self.input_size)
        return Promptable(encoder, prompts, mask_head(num_classes))

    def normalise(self, volumes: Tensor) -> Tensor:
        """Scale each crop to [0, 1]; the encoder subtracts SAM's pixel mean and divides by its deviation."""
        return rescale_to_unit(volumes)


@hookimpl
def foundation_models() -> list[type[FoundationModel]]:
    """The one size."""
    return [MobileSam]
