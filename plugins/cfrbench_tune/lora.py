"""LoRA on the attention of the image encoder, decoder trained in full: the fine-tuning of SAMed and CFR; relatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cfrbench.config import Frozen
from cfrbench.contracts import FineTuner, Promptable, Published
from cfrbench.errors import PluginError
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import freeze
from cfrbench.tuners import TINY_VIT, VIT, NamedTuner, trainable

PROJECTIONS = ("q", "k", "v")
MLP_LAYERS = ("mlp.lin1", "mlp.lin2", "mlp.fc1", "mlp.fc2")

Preset = Literal["cfr", "samed", "samed_s", "msa"]
#: what a preset fills in. MSA's LoRA mode (KidsWithTokens/Medical-SAM-Adapter) scales by 1 / rank
PRESETS: dict[str, dict[str, Any]] = {
    "samed_s": {"decoder": "lora"},
    "msa": {"alpha": 1.0, "mlp": True},
}
#: how SAMed trains where CFR does otherwise (hitachinsk/SAMed ``trainer.py`` and its README)
SAMED = {
    "tuning.lr": 0.005,
    "tuning.warmup_steps": 250,
    "tuning.loss_at": "logits",
    "tuning.dice_weight": 0.8,
    "tuning.dice_smooth": 1e-5,
}


class SplitQKV(nn.Module):
    """A fused ``qkv`` linear as three, so that each can be adapted alone; same output, row for row."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        weights, biases = fused.weight.chunk(3), fused.bias.chunk(3)
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
            self.add_module(f"{name}_proj", _linear(weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to ``(..., 3 width)``: queries, keys, values."""
        return torch.cat(self.parts(x), dim=-1)

    def parts(self, x: Tensor) -> list[Tensor]:
        """The same apart, which spares `BlockedAttention` a copy."""
        return [projection(x) for projection in self.children()]

    def fused(self) -> nn.Linear:
        """One linear again."""
        weights, biases = zip(*((part.weight, part.bias) for part in self.children()), strict=True)
        return _linear(torch.cat(weights), torch.cat(biases))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


class Lora(NamedTuner):
    """Two small matrices beside each frozen query and value projection; prompt encoder and mask decoder train whole.

    Flagged trainable without ever getting a gradient, as in the official code: the IoU head, and all of the prompt
    encoder but the "no mask" embedding.
    """

    name = "lora"
    encoders = (VIT, TINY_VIT)
    place = "its matrices stand on the fused qkv layer"
    published: ClassVar[tuple[Published, ...]] = (
        *(Published(f"CFR, {n} class{'es' * (n > 1)}", num_classes=n + 1) for n in (1, 2, 3, 8, 13)),
        *(Published(f"SAMed, {n} class{'es' * (n > 1)}", input_size=512, num_classes=n + 1) for n in (1, 8, 13)),
        Published("SAMed_s, 8 classes", {"preset": "samed_s"}, input_size=512, num_classes=9),
        Published("MSA LoRA, as SAM", {"preset": "msa"}, num_classes=4),
    )
    #: what makes a relative of LoRA in peft
    kind: ClassVar[Mapping[str, Any]] = {}

    class Config(Frozen):
        """A preset fills in what is not set by itself; the default is CFR's and SAMed's network."""

        preset: Preset = Field("cfr", description="network of CFR, SAMed or SAMed_s with their training, or of MSA")
        rank: int = Field(4, ge=1)
        alpha: float | None = Field(None, gt=0, description="scale is alpha / rank; None = rank, so 1 (official)")
        targets: tuple[Literal["q", "k", "v"], ...] = Field(
            ("q", "v"), min_length=1, description="projections of a ViT; TinyViT's rows alternate, so all adapt there"
        )
        mlp: bool = Field(False, description="matrices on both layers of each MLP too")
        decoder: Literal["whole", "lora"] = Field(
            "whole", description="'lora': the decoder's transformer is frozen but for matrices of the same rank"
        )

        @model_validator(mode="before")
        @classmethod
        def _fill_in(cls, values: Any) -> Any:
            return PRESETS.get(values.get("preset", "cfr"), {}) | values if isinstance(values, dict) else values

    config: Config

    def protocol(self) -> Mapping[str, Any]:
        """SAMed's training for its presets, but its 512 pixels and 160 of 200 epochs of batch 24."""
        return SAMED if self.config.preset in ("samed", "samed_s") else {}

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Freeze the encoder, put adapters in; return adapters, prompt encoder and decoder."""
        freeze(model.image_encoder)
        model.prompt_encoder.requires_grad_(True)
        model.mask_decoder.requires_grad_(True)
        # On the encoder alone: wrapping the whole model would freeze the decoder and hit its q_proj and v_proj too.
        self._inject(model.image_encoder, list(self._prepare(model.image_encoder)))
        if self.config.decoder == "lora":
            transformer = model.mask_decoder.get_submodule("transformer")
            self._inject(transformer, [name for name, _ in transformer.named_modules()
                                       if name.endswith(("q_proj", "v_proj"))])  # fmt: skip
        return trainable(model)

    def _inject(self, module: nn.Module, targets: list[str]) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        rank = self.config.rank
        alpha: Any = self.config.alpha  # peft says int and computes with any number
        settings = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=targets, **self.kind)
        inject_adapter_in_model(settings, module)
        for layer in module.modules():
            if isinstance(layer, LoraLayer) and not layer.lora_variant:
                # Autocast rounds the input; peft would first make it as precise as A, of which only DoRA makes use.
                layer.cast_input_dtype_enabled = False

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
        if self.config.mlp:
            yield from (name for name, _ in encoder.named_modules() if name.endswith(MLP_LAYERS))

    def tuned(self, model: Promptable) -> dict[str, Tensor]:
        """As for every fine-tuner; the names do not depend on the version of peft."""
        return {name.replace(".default.", "."): tensor for name, tensor in super().tuned(model).items()}

    def merge(self, model: Promptable) -> None:
        """Add ``B A`` to the frozen weights and put plain fused layers back: the encoder is SAM's again."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
        for _, attention in _attentions(model.image_encoder):
            if isinstance(attention.qkv, SplitQKV):
                attention.qkv = attention.qkv.fused()


class Dora(Lora):
    """LoRA whose sum with the frozen weight is rescaled row by row to a magnitude that trains (arXiv:2402.09353).

    Beyond the paper; as peft has it.
    """

    name = "dora"
    published = (Published("DoRA, 1 class"),)
    kind: ClassVar[Mapping[str, Any]] = {"use_dora": True}


class RsLora(Lora):
    """LoRA whose scale is alpha / sqrt(rank), so that higher ranks learn as fast (arXiv:2312.03732).

    Beyond the paper; as peft has it. It differs from LoRA in this factor alone.
    """

    name = "rslora"
    published = (Published("rsLoRA, 1 class"),)
    kind: ClassVar[Mapping[str, Any]] = {"use_rslora": True}


def _attentions(encoder: nn.Module) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in encoder.named_modules() if name.endswith(".attn") and hasattr(part, "qkv")]


@hookimpl
def fine_tuners() -> list[type[FineTuner]]:
    """LoRA and two relatives."""
    return [Lora, Dora, RsLora]
