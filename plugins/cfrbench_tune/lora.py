"""LoRA on the attention of the image encoder, decoder trained in full: the fine-tuning of SAMed and CFR."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.config import Frozen
from cfrbench.contracts import FineTuner, FoundationModel, Promptable
from cfrbench.errors import PluginError, WeightsError
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import freeze

#: encoders whose attention has a fused ``qkv`` that this file knows how to adapt
ENCODERS = ("vit", "tiny-vit")
PROJECTIONS = ("q", "k", "v")


class SplitQKV(nn.Module):
    """A fused ``qkv`` linear as three, so that each can be adapted alone; same output, row for row."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        weights, biases = fused.weight.chunk(3), fused.bias.chunk(3)
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
            self.add_module(f"{name}_proj", _linear(weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to ``(..., 3 width)``: queries, keys, values."""
        return torch.cat([projection(x) for projection in self.children()], dim=-1)

    def fused(self) -> nn.Linear:
        """One linear again."""
        weights, biases = zip(*((part.weight, part.bias) for part in self.children()), strict=True)
        return _linear(torch.cat(weights), torch.cat(biases))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


class Lora(FineTuner):
    """Two small matrices beside each frozen query and value projection; prompt encoder and mask decoder train whole.

    Flagged trainable without ever getting a gradient, as in the official code: the IoU head, and all of the prompt
    encoder but the "no mask" embedding.
    """

    name = "lora"

    class Config(Frozen):
        """The defaults are SAMed's and CFR's: rank 4, no scaling, queries and values."""

        rank: int = Field(4, ge=1)
        alpha: float | None = Field(None, gt=0, description="scale is alpha / rank; None = rank, so 1 (official)")
        targets: tuple[Literal["q", "k", "v"], ...] = Field(
            ("q", "v"), min_length=1, description="projections of a ViT; TinyViT's rows alternate, so all adapt there"
        )

    config: Config

    def refuses(self, model: FoundationModel) -> str | None:
        """Only encoders whose attention is known can be adapted."""
        encoder = getattr(model, "encoder", None)
        if encoder in ENCODERS:
            return None
        return (
            f"LoRA is placed on the fused qkv layer of {' and '.join(ENCODERS)} encoders, and {model.name} names "
            f"its encoder {encoder!r} (class attribute `encoder`)"
        )

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Freeze the encoder, put adapters in; return adapters, prompt encoder and decoder."""
        from peft import LoraConfig, inject_adapter_in_model

        freeze(model.image_encoder)
        rank = self.config.rank
        alpha: Any = self.config.alpha  # peft says int and computes with any number
        settings = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(self._prepare(model.image_encoder)))
        # On the encoder alone: wrapping the whole model would freeze the decoder and hit its q_proj and v_proj too.
        inject_adapter_in_model(settings, model.image_encoder)
        model.prompt_encoder.requires_grad_(True)
        model.mask_decoder.requires_grad_(True)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def _prepare(self, encoder: nn.Module) -> Iterator[str]:
        """Split what has to be split; yield the names of the layers to adapt."""
        attentions = [(name, part) for name, part in _attentions(encoder) if isinstance(part.qkv, nn.Linear)]
        if not attentions:
            raise PluginError(f"LoRA found no plain fused qkv layer in {type(encoder).__name__}. Build the model anew, "
                              "or choose a fine-tuner that fits this encoder.")  # fmt: skip
        for name, attention in attentions:
            # SAM's ViT stacks all queries, all keys, all values. TinyViT's rows go head by head: adapted as a whole.
            if hasattr(attention, "attention_biases"):
                yield f"{name}.qkv"
            else:
                attention.qkv = SplitQKV(attention.qkv)
                yield from (f"{name}.qkv.{target}_proj" for target in self.config.targets)

    def export(self, model: Promptable) -> dict[str, Tensor]:
        """Adapters, prompt encoder and decoder by name, as copies; names do not depend on the version of peft."""
        return {name: tensor.clone() for name, tensor in _tuned(model).items()}

    def restore(self, model: Promptable, tensors: Mapping[str, Tensor]) -> None:
        """Copy exported tensors in; WeightsError if one is missing, left over or of another shape."""
        own = _tuned(model)
        if own.keys() != tensors.keys():
            name = min(own.keys() ^ tensors.keys())
            raise _misfit(f"'{name}' stands only in the {'model' if name in own else 'tensors'}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise _misfit(f"'{name}' is {tuple(tensor.shape)} in the model and {tuple(tensors[name].shape)} there")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def merge(self, model: Promptable) -> None:
        """Add ``B A`` to the frozen weights and put plain fused layers back: the encoder is SAM's again."""
        for _, attention in _attentions(model.image_encoder):
            if isinstance(attention.qkv, SplitQKV):
                for name, part in list(attention.qkv.named_children()):
                    setattr(attention.qkv, name, _merged(part))
                attention.qkv = attention.qkv.fused()
            else:
                attention.qkv = _merged(attention.qkv)


def _attentions(encoder: nn.Module) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in encoder.named_modules() if name.endswith(".attn") and hasattr(part, "qkv")]


def _tuned(model: Promptable) -> dict[str, Tensor]:
    """The live tensors that fine-tuning changes, under the names they are exported by."""
    whole = ("prompt_encoder.", "mask_decoder.")
    return {
        name.replace(".default.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" in name or name.startswith(whole)
    }


def _merged(layer: nn.Module) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(layer, BaseTunerLayer):
        return layer
    layer.merge()
    plain: nn.Module = layer.get_base_layer()
    return plain


def _misfit(difference: str) -> WeightsError:
    return WeightsError(f"The fine-tuned tensors do not fit this model: {difference}. They belong to another number of "
                        "classes, foundation model, rank or choice of targets: take those of this run.")  # fmt: skip


@hookimpl
def fine_tuners() -> list[type[FineTuner]]:
    """LoRA."""
    return [Lora]
