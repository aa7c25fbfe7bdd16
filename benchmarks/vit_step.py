"""One fine-tuning step of SAM ViT-B with LoRA, in a process of its own: ours, or spelt out as the official code has it.

    python -m benchmarks.vit_step official|fp32|bf16|recompute SIZE STEPS

prints one JSON object: median seconds and processor seconds of STEPS steps and of as many forward passes, each after
one that is not counted, peak memory of the process, loss and gradient of the first step. The weights are functions of
their names, so that every variant starts from the same model.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cfrbench.heap import keep_freed_memory, large_blocks_apart
from cfrbench.machine import peak_mib

if __name__ == "__main__" and sys.argv[1] != "official":
    keep_freed_memory()  # as the command line does, before torch makes its first tensor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import medians
from cfrbench.config import ComputeSection

MASKS, RANK = 2, 4


@dataclass(frozen=True)
class Way:
    """One way of fine-tuning and of labelling: images ``(B, 3, S, S)`` to logits ``(B, C, S, S)``."""

    logits: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    merge: Callable[[], object] = lambda: None  # before it labels


def drawn(name: str, shape: torch.Size) -> Tensor:
    """The weights that a name stands for: small, so that activations stay in range."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    return 0.02 * torch.randn(shape, generator=generator)


def data(size: int) -> tuple[Tensor, Tensor]:
    """An image ``(1, 3, S, S)`` of three equal channels and a label ``(1, S, S)`` with a margin of 255."""
    generator = torch.Generator().manual_seed(0)
    image = F.interpolate(torch.randn(1, 1, 16, 16, generator=generator), size=(size, size), mode="bilinear")
    label = (image[:, 0] > 0).to(torch.uint8)
    label[:, :3] = 255
    return image.expand(-1, 3, -1, -1), label


# ---------------------------------------------------------------------------------------------------------------------
# the official step


class OfficialLora(nn.Module):
    """LoRA on a fused qkv as SAMed and CFR put it: computed beside it, added to slices of its output."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.qkv, self.width = qkv, qkv.in_features
        parts = {"a_q": (self.width, RANK), "b_q": (RANK, self.width), "a_v": (self.width, RANK),
                 "b_v": (RANK, self.width)}  # fmt: skip
        for name, ends in parts.items():
            self.add_module(name, nn.Linear(*ends, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.qkv(x)
        out[..., : self.width] += self.b_q(self.a_q(x))
        out[..., -self.width :] += self.b_v(self.a_v(x))
        return out


def official(size: int) -> Way:
    """The package's classes in single precision, the loss of CFR at full resolution."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer

    encoder = ImageEncoderViT(
        img_size=size, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4, out_chans=256, qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=14, global_attn_indexes=(2, 5, 8, 11),
    )  # fmt: skip
    side = size // 16
    prompts = PromptEncoder(embed_dim=256, image_embedding_size=(side, side), input_image_size=(size, size),
                            mask_in_chans=16)  # fmt: skip
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer, num_multimask_outputs=MASKS - 1)
    model = nn.ModuleDict({"image_encoder": encoder, "prompt_encoder": prompts, "mask_decoder": decoder})
    fill(model)
    encoder.requires_grad_(False)
    for index, block in enumerate(encoder.blocks):
        block.attn.qkv = OfficialLora(block.attn.qkv)
        for part in ("a_q", "b_q", "a_v", "b_v"):
            weight = block.attn.qkv.get_parameter(f"{part}.weight")
            weight.data = drawn(f"{index}.{part}", weight.shape)
    label = data(size)[1]

    def logits(image: Tensor) -> Tensor:
        sparse, dense = prompts(points=None, boxes=None, masks=None)
        low, _ = decoder.predict_masks(
            image_embeddings=encoder(image), image_pe=prompts.get_dense_pe(), sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )  # fmt: skip
        return F.interpolate(low, (size, size), mode="bilinear", align_corners=False)

    trained = [p for p in model.parameters() if p.requires_grad]
    return Way(logits, lambda found: official_loss(found, label.long()), trained)


def official_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Half of cross-entropy, which ignores 255, and of Dice, which does not."""
    entropy = F.cross_entropy(logits, label, ignore_index=255)
    probabilities = logits.softmax(dim=1)
    terms = []
    for c in range(MASKS):
        score, mask = probabilities[:, c], (label == c).float()
        overlap, size = (score * mask).sum(), (score * score).sum() + (mask * mask).sum()
        terms.append(1 - (2 * overlap + 1e-10) / (size + 1e-10))
    return 0.5 * (entropy + torch.stack(terms).mean())


# ---------------------------------------------------------------------------------------------------------------------
# ours


def adapted(size: int, recompute: bool = False) -> tuple[Any, Any, Any, list[nn.Parameter]]:
    """SAM ViT-B, its architecture with LoRA in it, the fine-tuner, and what trains."""
    from cfrbench import registry

    plugin = registry.load("model", "sam-vit-b")
    foundation = plugin(plugin.Config(input_size=size, recompute=recompute))
    model = foundation.architecture(MASKS)
    fill(model)
    tuner = registry.load("tune", "lora")()
    parameters = tuner.adapt(model)
    names = {"q_proj.lora_A": "a_q", "q_proj.lora_B": "b_q", "v_proj.lora_A": "a_v", "v_proj.lora_B": "b_v"}
    for name, parameter in model.named_parameters():
        if part := next((short for long, short in names.items() if long in name), None):
            parameter.data = drawn(f"{name.split('.')[2]}.{part}", parameter.shape)
    return foundation, model, tuner, parameters


def ours(size: int, *, half: bool = False, recompute: bool = False) -> Way:
    """The same step as `cfrbench` takes it."""
    from cfrbench.lean import halve_frozen
    from cfrbench.losses import ce_dice
    from cfrbench.tuning import CanvasSegmenter

    _, model, tuner, parameters = adapted(size, recompute)
    if half:
        halve_frozen(model.image_encoder, torch.bfloat16)
    network = CanvasSegmenter(model, size)
    label = data(size)[1]

    def logits(image: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found: Tensor = network(image[:, 0])
        return found

    return Way(logits, lambda found: ce_dice(found, label, smooth=1e-10), parameters, lambda: tuner.merge(model))


# ---------------------------------------------------------------------------------------------------------------------
# the step


def fill(model: nn.Module) -> None:
    """Give every parameter the weights of its name."""
    for name, parameter in model.named_parameters():
        parameter.data = drawn(name, parameter.shape)
    table: Any = model.get_buffer("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")
    table.copy_(50 * drawn("table", table.shape))


VARIANTS: dict[str, Callable[[int], Way]] = {
    "official": official,
    "fp32": ours,
    "bf16": partial(ours, half=True),
    "recompute": partial(ours, recompute=True),
}


def measure(variant: str, size: int, steps: int) -> dict[str, float]:
    """Take AdamW steps, then label; the first of each warms up memory and is not counted."""
    torch.set_num_threads(ComputeSection().threads)
    torch.manual_seed(0)
    way = VARIANTS[variant](size)
    image = data(size)[0]
    optimiser = torch.optim.AdamW(way.parameters, lr=1e-3, weight_decay=0.1, foreach=False)
    found: dict[str, float] = {}

    def step(number: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        value = way.loss(way.logits(image))
        value.backward()  # type: ignore[no-untyped-call]
        if not number:
            gradients = [p.grad.float().norm() for p in way.parameters if p.grad is not None]
            found.update(loss=float(value.detach()), gradient=float(torch.stack(gradients).norm()))
        optimiser.step()

    with large_blocks_apart():
        step(0)
    seconds, cpu_seconds = medians(step, steps)
    found |= {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak_mib()}
    optimiser.zero_grad(set_to_none=True)
    way.merge()
    with torch.inference_mode():
        way.logits(image)
        forward, cpu_forward = medians(lambda _: way.logits(image), steps)
    return found | {"forward_seconds": forward, "forward_cpu_seconds": cpu_forward}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
