"""SAM, LoRA, the CFR model and its losses against arrays computed by the official classes."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrbench.contracts import Promptable
from cfrbench.losses import ce_dice, cross_entropy, dice_loss
from cfrbench.promptable import DecoderShape, ViTShape, resize_positions, vit_sam
from cfrbench_tune.lora import Lora
from tests.golden.ledger import ledger

BOOK = ledger("finetuners")

DECODER_HEADS = 2  # the one size that no array tells
SMOOTH = 1e-10
CLASS_COUNTS = sorted({int(found[1]) for key in BOOK.arrays if (found := re.match(r"c/nc(\d+)/", key))})


def take(key: str) -> Tensor:
    return torch.from_numpy(BOOK.take(key))


def close(actual: Tensor, key: str, rtol: float = 1e-4, atol: float = 5e-5) -> None:
    expected = take(key)
    torch.testing.assert_close(actual.detach(), expected.to(actual.dtype), rtol=rtol, atol=atol)


def parameters(prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): take(key) for key in BOOK.keys(prefix)}


@cache
def shapes() -> tuple[ViTShape, DecoderShape, int]:
    """Sizes of the model and its input, read from the arrays."""
    state = parameters("a/param/")
    patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
    _, grid, _, width = state["image_encoder.pos_embed"].shape
    tables = [
        len(state[f"image_encoder.blocks.{i}.attn.rel_pos_h"]) for i in range(count(state, "image_encoder.blocks"))
    ]
    columns = state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1]
    vit = ViTShape(
        width=width,
        depth=len(tables),
        heads=width // columns,
        global_blocks=tuple(i for i, rows in enumerate(tables) if rows == 2 * grid - 1),
        window=(min([rows for rows in tables if rows != 2 * grid - 1], default=2 * grid - 1) + 1) // 2,
        patch=patch,
        # half a unit more, because the encoder rounds ratio x width down
        mlp_ratio=(len(state["image_encoder.blocks.0.mlp.lin1.weight"]) + 0.5) / width,
    )
    decoder = DecoderShape(
        width=len(state["image_encoder.neck.0.weight"]),
        depth=count(state, "mask_decoder.transformer.layers"),
        heads=DECODER_HEADS,
        mlp_width=len(state["mask_decoder.transformer.layers.0.mlp.lin1.weight"]),
        iou_width=len(state["mask_decoder.iou_prediction_head.layers.0.weight"]),
        mask_channels=len(state["prompt_encoder.mask_downscaling.3.weight"]),
    )
    return vit, decoder, grid * patch


def count(state: dict[str, Tensor], prefix: str) -> int:
    depth = prefix.count(".") + 1
    return len({name.split(".")[depth] for name in state if name.startswith(prefix + ".")})


def build(state: dict[str, Tensor]) -> Promptable:
    vit, decoder, input_size = shapes()
    model = vit_sam(vit, input_size, len(state["mask_decoder.mask_tokens.weight"]), decoder)
    model.load_state_dict(state)  # strict: the names are SAM's
    return model.eval()


def decode(model: Promptable, embedding: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    sparse, dense = model.prompt_encoder(points=None, boxes=boxes, masks=None)
    masks, iou = model.mask_decoder(
        image_embeddings=embedding,
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )
    return masks, iou


# a: plain SAM -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_image_encoder() -> None:
    model = build(parameters("a/param/"))
    encoder, image = model.image_encoder, take("a/input")
    x = encoder.get_submodule("patch_embed")(image) + encoder.get_parameter("pos_embed")
    close(x, "a/after_pos")
    for index, block in enumerate(encoder.get_submodule("blocks").children()):
        x = block(x)
        close(x, f"a/block{index}")
    close(encoder(image), "a/embedding")


@torch.no_grad()
def test_head_without_prompts_holds_both_answers_of_sam() -> None:
    model = build(parameters("a/param/"))
    sparse, dense = model.prompt_encoder(points=None, boxes=None, masks=None)
    close(sparse, "a/sparse_none")
    close(dense, "a/dense_none")
    close(model.prompt_encoder.get_dense_pe(), "a/dense_pe")
    masks, iou = decode(model, take("a/embedding"))
    close(masks[:, :1], "a/masks_multi0")
    close(iou[:, :1], "a/iou_multi0")
    close(masks[:, 1:], "a/masks_multi1")
    close(iou[:, 1:], "a/iou_multi1")
    torch.testing.assert_close(model(take("a/input")), masks, rtol=1e-4, atol=5e-5)


@torch.no_grad()
def test_head_with_a_box() -> None:
    model = build(parameters("a/param/"))
    box = take("a/box")
    sparse, _ = model.prompt_encoder(points=None, boxes=box, masks=None)
    close(sparse, "a/sparse_box")
    masks, iou = decode(model, take("a/embedding")[:1], box)
    close(masks[:, :1], "a/masks_box")
    close(iou[:, :1], "a/iou_box")


# b: LoRA on one layer -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lora_on_one_fused_layer() -> None:
    weight, bias, x = take("b/qkv_weight"), take("b/qkv_bias"), take("b/input")
    fused = nn.Linear(weight.shape[1], weight.shape[0])
    fused.load_state_dict({"weight": weight, "bias": bias})
    encoder, attention = nn.Module(), nn.Module()
    attention.add_module("qkv", fused)
    encoder.add_module("attn", attention)
    model = Promptable(nn.ModuleList([encoder]), nn.Module(), nn.Module())
    tuner = Lora(Lora.Config(rank=len(BOOK.arrays["b/Aq"])))
    tuner.adapt(model)
    close(attention.get_submodule("qkv")(x), "b/base_out")
    matrices = {f"qkv.{p}_proj.lora_{m}.default.weight": take(f"b/{m}{p}").float() for p in "qv" for m in "AB"}
    assert attention.load_state_dict(matrices, strict=False).unexpected_keys == []
    close(attention.get_submodule("qkv")(x), "b/lora_out", rtol=1e-6, atol=1e-6)
    tuner.merge(model)
    close(attention.get_parameter("qkv.weight"), "b/merged_weight", rtol=1e-6, atol=1e-6)
    close(attention.get_submodule("qkv")(x), "b/lora_out", rtol=0, atol=1e-5)


# c: the CFR model ---------------------------------------------------------------------------------------------------


def cfr(classes: int) -> tuple[Promptable, Lora]:
    """The fine-tuned model of ``classes`` foreground classes, its adapters fresh (B = 0)."""
    state = {name: value for name, value in parameters("a/param/").items() if not name.startswith("mask_decoder.")}
    model = build(state | parameters(f"c/nc{classes}/param/"))
    tuner = Lora(Lora.Config(rank=len(BOOK.arrays["c/lora/A0"])))
    tuner.adapt(model)
    return model, tuner


def set_adapters(model: Promptable, tuner: Lora) -> None:
    """Pairs go block by block, query before value."""
    tensors = tuner.export(model)
    pairs = [(f"image_encoder.blocks.{i}.attn.qkv.{p}_proj", 2 * i + (p == "v")) for i in range(shapes()[0].depth)
             for p in "qv"]  # fmt: skip
    for name, number in pairs:
        for matrix in "AB":
            tensors[f"{name}.lora_{matrix}.weight"] = take(f"c/lora/{matrix}{number}")
    tuner.restore(model, tensors)


def check_outputs(model: Promptable, prefix: str) -> None:
    image = take("a/input")
    low = model(image)
    close(low, f"{prefix}/low_res_logits")
    close(F.interpolate(low, image.shape[-2:], mode="bilinear", align_corners=False), f"{prefix}/masks")
    close(decode(model, model.image_encoder(image))[1], f"{prefix}/iou_predictions")


@pytest.mark.parametrize("classes", CLASS_COUNTS)
@torch.no_grad()
def test_cfr_model(classes: int) -> None:
    model, tuner = cfr(classes)
    check_outputs(model, f"c/nc{classes}/zeroB")
    set_adapters(model, tuner)
    check_outputs(model, f"c/nc{classes}")
    close(model.image_encoder(take("a/input")), f"c/nc{classes}/embedding")
    tuner.merge(model)
    check_outputs(model, f"c/nc{classes}")


# e: losses and gradients --------------------------------------------------------------------------------------------


def scalar(value: Tensor, key: str) -> None:
    assert value.item() == pytest.approx(float(BOOK.take(key)), rel=1e-4), key


@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_losses_and_gradients(classes: int) -> None:
    model, tuner = cfr(classes)
    set_adapters(model, tuner)
    group, label = f"e/nc{classes}", take(f"e/nc{classes}/label").to(torch.uint8)
    low = model(take("a/input"))
    full = F.interpolate(low, label.shape[-2:], mode="bilinear", align_corners=False)
    scalar(cross_entropy(full, label), f"{group}/cfr_ce")
    scalar(dice_loss(full.softmax(dim=1), label, smooth=SMOOTH), f"{group}/cfr_dice")
    loss = ce_dice(full, label, smooth=SMOOTH)
    scalar(loss, f"{group}/cfr_loss")
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    scalar(norm(gradients, ".lora_"), f"{group}/grad_l2_lora")
    scalar(norm(gradients, "mask_decoder."), f"{group}/grad_l2_decoder")
    close(gradients["prompt_encoder.no_mask_embed.weight"], f"{group}/grad_no_mask_embed")
    silent = {f"sam.{name}" for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert silent == set(BOOK.take("e/no_grad_names").tolist())


def norm(gradients: dict[str, Tensor], part: str) -> Tensor:
    together = torch.cat([gradient.flatten() for name, gradient in gradients.items() if part in name])
    return together.square().sum().sqrt()


@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_samed_loss_on_low_resolution(classes: int) -> None:
    low_label, label = take(f"e/nc{classes}/samed_low_label"), take(f"e/nc{classes}/label")
    step = label.shape[-1] // low_label.shape[-1]
    shrunk = label[:, ::step, ::step]
    assert torch.equal(torch.where(shrunk == 255, 0, shrunk), low_label)
    low = take(f"c/nc{classes}/low_res_logits")
    loss = 0.2 * cross_entropy(low, low_label) + 0.8 * dice_loss(low.softmax(dim=1), low_label)
    scalar(loss, f"e/nc{classes}/samed_loss")


# f: position tables -------------------------------------------------------------------------------------------------


def test_position_tables() -> None:
    absolute, relative = "image_encoder.pos_embed", "image_encoder.blocks.0.attn.rel_pos_h"
    for key in [key for key in BOOK.keys("f/pos_") if key != "f/pos_in"]:
        resized = resize_positions({absolute: take("f/pos_in")}, BOOK.arrays[key].shape[1], ())
        close(resized[absolute], key, atol=1e-6)
    for key in [key for key in BOOK.keys("f/rel_") if key != "f/rel_in"]:
        resized = resize_positions({relative: take("f/rel_in")}, (len(BOOK.arrays[key]) + 1) // 2, (0,))
        close(resized[relative], key, atol=1e-6)
