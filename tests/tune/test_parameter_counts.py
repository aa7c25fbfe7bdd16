"""Parts of each fine-tuner on SAM ViT-B have the sizes of the official ones; no weights, no memory.

``tests/foundation/test_parameters.py`` counts the whole.
"""

from __future__ import annotations

from typing import Any

import torch

from cfrbench.contracts import Promptable
from cfrbench.promptable import VIT_B, vit_sam
from tests.tune.models import tuner_of


def adapted(name: str, size: int, masks: int, **options: Any) -> Promptable:
    with torch.device("meta"):
        model = vit_sam(VIT_B, size, masks)
        tuner_of(name, **options).adapt(model)
    return model


def total(model: Promptable, part: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if part in name)


def flagged(model: Promptable, part: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and part in name)


def test_parts_of_relatives_of_lora_and_of_the_probe() -> None:
    lora, dora = adapted("lora", 1024, 2), adapted("dora", 1024, 2)
    assert total(dora) - total(lora) == flagged(dora, "magnitude") == 12 * 2 * 768  # a magnitude for each row
    assert total(adapted("rslora", 1024, 2)) == total(lora)
    assert flagged(adapted("linear-probe", 1024, 2)) == 2 * 256 + 2 * 139_808
    assert flagged(adapted("linear-probe", 1024, 2, heads=False)) == 2 * 256
    samed = adapted("lora", 512, 9, preset="samed_s")
    assert (total(samed, ".lora_") - 147_456, flagged(samed, "mask_decoder.transformer.")) == (23_552, 23_552)


def test_parts_of_the_adapters() -> None:
    msa = adapted("msa-adapter", 1024, 4)
    assert total(msa, "image_encoder.") == 100_322_304
    assert total(msa, "Adapter") - total(msa, "Depth_Adapter") == 7_100_928
    msa_lora = adapted("lora", 1024, 4, preset="msa")
    assert (total(msa_lora, "image_encoder."), total(msa_lora, ".lora_")) == (90_187_008, 516_096)
    samus = adapted("samus", 1024, 4, prompt="click")
    parts = ("cnn_embed", "post_pos_embed", "input_Adapter", "MLP_Adapter", "Space_Adapter", "refine_Adapter")
    assert [flagged(samus, part) for part in parts] == [2_142_272, 5_309_952, 295_872, 1_183_488, 9_449_472, 21_239_808]
    assert (total(samus, "image_encoder."), flagged(samus, "rel_pos")) == (129_259_008, 32_256)
    med2d = adapted("sam-med2d-adapter", 256, 4)
    assert (total(med2d, "blocks.0.Adapter"), flagged(med2d, "Adapter")) == (15_042_048, 180_504_576)


def test_parts_of_3dsam() -> None:
    volume = adapted("sam3d-adapter", 1024, 2, clicks=True)
    assert [total(volume, part) for part in ("image_encoder.", "prompt_encoder.", "mask_decoder.")] == [
        104_056_588,
        3_164_160,
        7_088_256,
    ]
    parts = (".adapter.", "slice_embed", "depth_embed", "rel_pos_d", "necks")
    assert [flagged(volume, part) for part in parts] == [7_220_736, 13_056, 24_576, 46_336, 7_868_416]
