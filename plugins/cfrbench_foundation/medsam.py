"""MedSAM (bowang-lab/MedSAM): SAM ViT-B trained on a million and a half pairs of medical images and masks."""

from __future__ import annotations

from torch import Tensor

from cfrbench.contracts import FoundationModel
from cfrbench.hookspecs import hookimpl
from cfrbench.intensity import rescale_to_unit
from cfrbench.pretrained import PretrainedViT, Release
from cfrbench.promptable import VIT_B


class MedSam(PretrainedViT):
    """The architecture of SAM ViT-B; images in [0, 1] go to the encoder as they are.

    Zenodo publishes the MD5 of the file, 3bb6db55bd0c9ca30b61248bca72f8d6, and no SHA-256.
    """

    name = "medsam"
    title = "MedSAM"
    kind = "SAM ViT-B"  # the shapes do not tell them apart
    licence = "Apache-2.0; the weights on Zenodo CC-BY-4.0"
    origin = "https://github.com/bowang-lab/MedSAM and https://zenodo.org/records/10689643"
    intensity = "gamma"
    note = (
        "MedSAM was trained on large public medical collections that may overlap with this data set; "
        "treat its rows as possibly contaminated."
    )
    release = Release("medsam_vit_b.pth", "https://zenodo.org/records/10689643/files/medsam_vit_b.pth", megabytes=375)
    shape = VIT_B

    def normalise(self, volumes: Tensor) -> Tensor:
        """Clip each crop to its 0.5-99.5 percentiles and scale it to [0, 1], as MedSAM's preprocessing does to MR.

        The original takes the percentiles of voxels that are not zero, and a fixed window for CT.
        """
        return rescale_to_unit(volumes)


@hookimpl
def foundation_models() -> list[type[FoundationModel]]:
    """The one size."""
    return [MedSam]
