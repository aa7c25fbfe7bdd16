"""What fine-tuners share: freezing, exporting by name and putting back; SAM's parts taken over to build on.

For fine-tuner plug-ins. `segment_anything` is imported when something is built, because that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cfrbench.config import Frozen
from cfrbench.contracts import FineTuner, FoundationModel, Promptable
from cfrbench.errors import PluginError, WeightsError

VIT, TINY_VIT = "vit", "tiny-vit"  # values of `FoundationModel.encoder`

PATCH = 16  # pixels a side of a token of SAM's ViT

#: Adam without decay, which is AdamW with decay 0, at a constant rate
CONSTANT: dict[str, Any] = {"tuning.weight_decay": 0.0, "tuning.poly_power": 0.0}

#: the trainers of MedSAM, which change neither intensities nor places
UNAUGMENTED: dict[str, Any] = {"tuning.intensity": "none", "tuning.rotflip": False, "tuning.rotflip_canvas": False}

M = TypeVar("M", bound=nn.Module)


class ScheduleOptions(Frozen):
    """Options of every fine-tuner whose authors train otherwise than CFR."""

    schedule: Literal["cfr", "original"] = Field(
        "cfr", description="'original': the authors' learning rate, its course and decay, and where the loss is taken"
    )


class NamedTuner(FineTuner):
    """Exports and restores tensors by their names in the model: all but the frozen part of the image encoder."""

    encoders: ClassVar[tuple[str, ...]] = ()  # encoders it fits; empty = every one
    place: ClassVar[str] = ""  # where it is put, for the refusal: "its adapters stand in the blocks"
    plain: ClassVar[bool] = False  # whether the encoder's blocks must hold no adapters yet
    halves: ClassVar[bool] = False  # whether the grid of tokens must be even
    original: ClassVar[Mapping[str, Any]] = {}  # settings of the authors' training, for ``schedule=original``

    def refuses(self, model: FoundationModel) -> str | None:
        """Only encoders whose parts are known can be built on."""
        if self.encoders and model.encoder not in self.encoders:
            return (
                f"{self.place} of {' and '.join(self.encoders)} encoders, and {model.name} names its encoder "
                f"{model.encoder!r} (class attribute `encoder`)"
            )
        if self.plain and getattr(model.config, "adapters", False):
            return f"{model.name} has adapters of its own in its blocks; set model.{model.name}.adapters=false"
        if self.halves and model.input_size % (2 * PATCH):
            return f"it halves the grid of tokens, so model.{model.name}.input_size must be a multiple of {2 * PATCH}"
        return None

    def protocol(self) -> Mapping[str, Any]:
        """The authors' settings, if asked for."""
        return self.original if getattr(self.config, "schedule", "cfr") == "original" else {}

    def export(self, model: Promptable) -> dict[str, Tensor]:
        """Everything but the frozen part of the image encoder, by name, as copies."""
        return {name: tensor.clone() for name, tensor in self.tuned(model).items()}

    def restore(self, model: Promptable, tensors: Mapping[str, Tensor]) -> None:
        """Copy exported tensors in; WeightsError if one is missing, left over or of another shape."""
        own = self.tuned(model)
        if own.keys() != tensors.keys():
            name = min(own.keys() ^ tensors.keys())
            raise _misfit(f"'{name}' stands only in the {'model' if name in own else 'tensors'}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise _misfit(f"'{name}' is {tuple(tensor.shape)} in the model and {tuple(tensors[name].shape)} there")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def merge(self, model: Promptable) -> None:
        """Leave the model as it is: what was injected is no linear map that weights could take in."""

    def tuned(self, model: Promptable) -> dict[str, Tensor]:
        """The live tensors that are exported, under the names they are exported by.

        Prompt encoder and decoder whole, because some of their parts are random wherever they are built.
        """
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name in trained or not name.startswith("image_encoder.")
        }


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that is not frozen, once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train_only(module: nn.Module, *parts: str) -> None:
    """Flag the parameters trainable whose dotted name holds one of ``parts``, and freeze the others."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))


def regrid(model: Promptable, grid: int, input_size: int) -> None:
    """Let prompts and positions count in ``grid`` x ``grid`` tokens and images of another size, in place."""
    model.input_size = input_size
    prompts = model.prompt_encoder
    prompts.image_embedding_size = (grid, grid)
    prompts.input_image_size = (input_size, input_size)
    prompts.mask_input_size = (4 * grid, 4 * grid)


def _misfit(difference: str) -> WeightsError:
    return WeightsError(f"The fine-tuned tensors do not fit this model: {difference}. They belong to another number of "
                        "classes, foundation model, rank or choice of targets: take those of this run.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# parts


def act_as(module: nn.Module, kind: type[M]) -> M:
    """Give a module another forward, in place: its parts, parameters, names and hooks stay."""
    module.__class__ = kind
    assert isinstance(module, kind)
    return module


def plain_blocks(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of SAM's image encoder; PluginError if something was put into them already."""
    blocks = list(encoder.get_submodule("blocks").children())
    for block in blocks:
        extra = [name for name, _ in block.named_children() if name not in ("norm1", "attn", "norm2", "mlp")]
        if extra:
            raise PluginError(f"The blocks of this image encoder hold '{extra[0]}' already. Build the model anew, "
                              "without adapters of its own, or choose a fine-tuner that needs none.")  # fmt: skip
    return blocks


class Bottleneck(nn.Module):
    """The adapter of Medical SAM Adapter: ``W2 gelu(W1 x)`` over a quarter of the width, added to ``x`` if residual.

    It starts from torch's default initialisation, so an adapted model is not the pre-trained one at first.
    """

    def __init__(self, width: int, residual: bool = False) -> None:
        super().__init__()
        self.D_fc1 = nn.Linear(width, width // 4)
        self.D_fc2 = nn.Linear(width // 4, width)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to the same shape."""
        change: Tensor = self.D_fc2(F.gelu(self.D_fc1(x)))
        return x + change if self.residual else change


def in_windows(x: Tensor, side: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``attend`` to windows ``(N, side, side, C)`` of a zero-padded map ``(B, H, W, C)``; side 0: to the map."""
    if side == 0:
        return attend(x)
    from segment_anything.modeling.image_encoder import window_partition, window_unpartition

    windows, padded = window_partition(x, side)
    joined: Tensor = window_unpartition(attend(windows), side, padded, x.shape[1:3])
    return joined


def channel_norm(channels: int) -> nn.Module:
    """SAM's layer norm over the channels of ``(B, C, H, W)``."""
    from segment_anything.modeling.common import LayerNorm2d

    norm: nn.Module = LayerNorm2d(channels)
    return norm


def resize_table(table: Tensor, rows: int) -> Tensor:
    """A relative-position table ``(n, width)`` linearly interpolated to ``(rows, width)``."""
    return table if len(table) == rows else F.interpolate(table.T.unsqueeze(0), size=rows, mode="linear")[0].T
