"""SAM-Med2D (OpenGVLab/SAM-Med2D): SAM ViT-B at 256 pixels with an adapter beside every MLP of its encoder."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cfrbench.contracts import FoundationModel, Promptable
from cfrbench.hookspecs import hookimpl
from cfrbench.intensity import rescale_to_unit
from cfrbench.med2d import add_adapters
from cfrbench.pretrained import PretrainedViT, Release, ViTConfig
from cfrbench.promptable import VIT_B, standardise_pixels


class SamMed2d(PretrainedViT):
    """271,241,776 parameters, two thirds of them adapters; their convolutions need an even number of tokens a side."""

    name = "sam-med2d"
    title = "SAM-Med2D"
    kind = "SAM-Med2D"
    licence = "Apache-2.0"
    origin = "https://github.com/OpenGVLab/SAM-Med2D#sam-med2d-checkpoint"
    intensity = "gamma"
    note = (
        "SAM-Med2D was trained on large public medical collections that may overlap with this data set; "
        "treat its rows as possibly contaminated."
    )
    release = Release("sam-med2d_b.pth")
    shape = VIT_B

    class Config(ViTConfig):
        """The defaults are the original's."""

        input_size: int = Field(256, ge=32, multiple_of=32, description="side of the encoder's image in pixels")
        adapters: bool = Field(
            True, description="False drops them, an official option of which better generalisation is claimed"
        )

    config: Config

    def architecture(self, num_classes: int) -> Promptable:
        """SAM with the adapters, all random."""
        model = super().architecture(num_classes)
        standardise_pixels(model.image_encoder)
        if self.config.adapters:
            add_adapters(model.image_encoder)
        return model

    def normalise(self, volumes: Tensor) -> Tensor:
        """Scale each crop to [0, 1]; the encoder subtracts SAM's pixel mean and divides by its deviation."""
        return rescale_to_unit(volumes)


@hookimpl
def foundation_models() -> list[type[FoundationModel]]:
    """The one size."""
    return [SamMed2d]
