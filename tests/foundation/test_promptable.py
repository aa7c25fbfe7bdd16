"""The head, the partial load, the position tables and freezing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrbench.errors import WeightsError
from cfrbench.promptable import (
    DecoderShape,
    FrozenBatchNorm2d,
    ViTShape,
    freeze,
    load_matching,
    mask_head,
    prompt_encoder,
    resize_positions,
    vit_sam,
)

DECODER = DecoderShape(width=16, heads=2, mlp_width=32, iou_width=16, mask_channels=4)
VIT = ViTShape(width=32, depth=3, heads=2, global_blocks=(1,), window=2)


def decode(head: nn.Module, prompts: Any, embedding: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    sparse, dense = prompts(points=None, boxes=boxes, masks=None)
    masks, iou = head(
        image_embeddings=embedding,
        image_pe=prompts.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return masks, iou


# head ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 5])
@torch.no_grad()
def test_head_returns_one_mask_a_class_for_every_image(classes: int) -> None:
    head, prompts = mask_head(classes, DECODER), prompt_encoder(4, 64, DECODER)
    embedding = torch.randn(3, 16, 4, 4)
    masks, iou = decode(head, prompts, embedding)
    assert masks.shape == (3, classes, 16, 16)
    assert iou.shape == (3, classes)
    singly = torch.cat([decode(head, prompts, image)[0] for image in embedding.unsqueeze(1)])
    torch.testing.assert_close(masks, singly, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_one_prompt_for_each_image_goes_with_that_image() -> None:
    head, prompts = mask_head(3, DECODER), prompt_encoder(4, 64, DECODER)
    embedding = torch.randn(3, 16, 4, 4)
    boxes = torch.tensor([[4.0, 8.0, 30.0, 40.0], [0.0, 0.0, 63.0, 63.0], [20.0, 20.0, 24.0, 60.0]])
    pairs = zip(embedding.unsqueeze(1), boxes.unsqueeze(1), strict=True)
    singly = torch.cat([decode(head, prompts, image, box)[0] for image, box in pairs])
    torch.testing.assert_close(decode(head, prompts, embedding, boxes)[0], singly, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_several_prompts_for_one_image_work_as_in_sam() -> None:
    from segment_anything.modeling import MaskDecoder, TwoWayTransformer

    head, prompts = mask_head(4, DECODER), prompt_encoder(4, 64, DECODER)
    transformer = TwoWayTransformer(depth=2, embedding_dim=16, mlp_dim=32, num_heads=2)
    base = MaskDecoder(transformer_dim=16, transformer=transformer, num_multimask_outputs=3, iou_head_hidden_dim=16)
    base.load_state_dict(head.state_dict())
    boxes = torch.tensor([[4.0, 8.0, 30.0, 40.0], [0.0, 0.0, 63.0, 63.0]])
    embedding = torch.randn(1, 16, 4, 4)
    ours, theirs = decode(head, prompts, embedding, boxes), decode(base, prompts, embedding, boxes)
    torch.testing.assert_close(ours[0][:, :1], theirs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1][:, :1], theirs[1], rtol=1e-5, atol=1e-6)


def test_positions_keep_full_precision_under_autocast() -> None:
    prompts: Any = prompt_encoder(16, 64, DECODER)
    exact = prompts.get_dense_pe()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prompts.get_dense_pe(), exact)


# partial load -------------------------------------------------------------------------------------------------------


def filled(classes: int, value: float) -> nn.Module:
    model = vit_sam(VIT, 64, classes, DECODER)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def loaded(classes: int, *, intended: bool) -> dict[str, bool]:
    """Tensor name -> whether it was taken from a checkpoint with SAM's four mask tokens."""
    model = filled(classes, 0.0)
    left = load_matching(model, filled(4, 1.0).state_dict(), intended=intended)
    state = {name: bool((tensor == 1.0).all()) for name, tensor in model.state_dict().items()}
    assert left == [name for name, taken in state.items() if not taken]
    return state


@pytest.mark.parametrize("classes", [2, 4, 6, 14])
def test_what_the_official_load_takes(classes: int) -> None:
    state = loaded(classes, intended=False)
    for name, taken in state.items():
        part = name.removeprefix("mask_decoder.")
        if part.startswith(("mask_tokens", "iou_prediction_head.layers.2")):
            assert taken == (classes == 4), name
        elif part.startswith("output_hypernetworks_mlps"):
            assert taken == (int(part.split(".")[1]) < 4), name
        else:
            assert taken, name


@pytest.mark.parametrize("classes", [2, 4, 6])
def test_what_the_intended_load_takes(classes: int) -> None:
    random = ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")
    for name, taken in loaded(classes, intended=True).items():
        assert taken != any(part in name for part in random), name


def test_a_state_of_another_shape_is_refused() -> None:
    wider = vit_sam(ViTShape(width=48, depth=3, heads=2, global_blocks=(1,), window=2), 64, 4, DECODER)
    with pytest.raises(WeightsError, match=r"does not fit the model: .* first is image_encoder"):
        load_matching(filled(2, 0.0), wider.state_dict())


# position tables ----------------------------------------------------------------------------------------------------


def position_state(depth: int = 13) -> dict[str, Tensor]:
    tables = {
        f"image_encoder.blocks.{i}.attn.rel_pos_{axis}": torch.randn(15, 6) for i in range(depth) for axis in "hw"
    }
    return {"image_encoder.pos_embed": torch.randn(1, 8, 8, 6), "image_encoder.neck.1.bias": torch.randn(4), **tables}


def test_only_named_global_blocks_change() -> None:
    state = position_state()
    resized = resize_positions(state, 4, (1, 12))
    changed = {name for name in state if resized[name] is not state[name]}
    blocks = {f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (1, 12) for axis in "hw"}
    assert changed == blocks | {"image_encoder.pos_embed"}  # not 2 or 11, although digits of theirs occur
    assert resized["image_encoder.pos_embed"].shape == (1, 4, 4, 6)
    assert all(resized[name].shape == (7, 6) for name in blocks)


@pytest.mark.parametrize("grid", [4, 5, 16])
def test_relative_tables_are_resized_as_the_official_two_dimensional_resize_does(grid: int) -> None:
    state = position_state(1)
    name = "image_encoder.blocks.0.attn.rel_pos_h"
    official = F.interpolate(state[name][None, None], size=(2 * grid - 1, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize_positions(state, grid, (0,))[name], official[0, 0], rtol=1e-5, atol=1e-6)


def test_resizing_to_the_same_grid_changes_no_value() -> None:
    state = position_state(2)
    for name, tensor in resize_positions(state, 8, (0, 1)).items():
        assert torch.equal(tensor, state[name]), name


# freezing -----------------------------------------------------------------------------------------------------------


def test_frozen_batch_norms_survive_train() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    names = list(network.state_dict())
    freeze(network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    assert isinstance(network[1], FrozenBatchNorm2d)
    assert [part.training for part in network] == [True, False, True]
    network(torch.randn(2, 3, 4, 4) + 5)
    assert list(network.state_dict()) == names
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in names)
    assert not any(p.requires_grad for p in network.parameters())
