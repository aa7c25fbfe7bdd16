"""Attention in blocks gives the numbers and gradients of the package's attention, and keeps no table of all pairs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench import blocked_attention
from cfrbench.blocked_attention import attend_with_bias, block_attention
from cfrbench.promptable import DecoderShape, ViTShape, vit_sam

VIT = ViTShape(width=24, depth=3, heads=3, global_blocks=(0, 2), window=3)
Parts = dict[str, Tensor]


def pair(side: int, width: int, heads: int) -> tuple[nn.Module, nn.Module]:
    """One attention module of the package for a map of ``side`` tokens, and ours with its weights."""
    from segment_anything.modeling.image_encoder import Attention

    theirs = Attention(width, num_heads=heads, use_rel_pos=True, input_size=(side, side))
    with torch.no_grad():
        for table in (theirs.rel_pos_h, theirs.rel_pos_w):
            table.normal_(std=0.3)
        # Default weights spread attention over all 4096 tokens, which averages the output away: larger queries and keys
        # pick tokens, and a wrong bias or block then shows in it.
        theirs.qkv.weight[: 2 * width].mul_(3)
    holder, block = nn.Module(), nn.Module()
    block.attn = copy.deepcopy(theirs)
    holder.blocks = nn.ModuleList([block])
    block_attention(holder)
    return block.attn, theirs


def run(module: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Parts]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    output: Tensor = module(x)
    (output * upstream).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return output.detach(), gradients | {"input": x.grad}


def largest_difference(ours: nn.Module, theirs: nn.Module, maps: int, side: int, width: int) -> float:
    """Over output and all gradients; gradients are means over tokens, so they are of the size of the output."""
    generator = torch.Generator().manual_seed(side)
    x, upstream = (torch.randn(maps, side, side, width, generator=generator) for _ in range(2))
    upstream = upstream / (maps * side * side)
    output, gradients = run(ours, x, upstream)
    expected, expected_gradients = run(theirs, x, upstream)
    assert gradients.keys() == expected_gradients.keys()
    assert float(expected.std()) > 0.05
    errors = {name: float((gradient - expected_gradients[name]).abs().max()) for name, gradient in gradients.items()}
    return max(float((output - expected).abs().max()), *errors.values())


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_global_attention_equals_the_package(size: int) -> None:
    ours, theirs = pair(size // 16, 16, 2)
    assert largest_difference(ours, theirs, 1, size // 16, 16) < 1e-5


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_window_attention_equals_the_package(size: int) -> None:
    ours, theirs = pair(14, 24, 3)
    windows = (-(-size // 16 // 14)) ** 2  # the grid is padded to whole windows of 14
    assert largest_difference(ours, theirs, windows, 14, 24) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("maps", "side"), [(1, 64), (25, 14)])
def test_attention_of_vit_b_equals_the_package(maps: int, side: int) -> None:
    ours, theirs = pair(side, 768, 12)
    assert largest_difference(ours, theirs, maps, side, 768) < 1e-5


@pytest.mark.parametrize(("queries", "scores"), [(1, 1), (10, 700), (25, 1 << 20), (64, 64 * 64 * 2)])
def test_the_size_of_blocks_changes_nothing(queries: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "QUERIES", queries)
    monkeypatch.setattr(blocked_attention, "QUERIES_BACK", queries)
    monkeypatch.setattr(blocked_attention, "SCORES", scores)
    ours, theirs = pair(8, 24, 3)
    assert largest_difference(ours, theirs, 2, 8, 24) < 1e-5


def test_the_number_of_queries_at_once_changes_no_bit_of_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward computes weights again with fewer at once, so they must be those of forward."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, rows, columns = (torch.randn(2, 1600, 40, generator=generator).bfloat16() for _ in range(5))
    results = []
    for queries in (256, 512):
        monkeypatch.setattr(blocked_attention, "QUERIES", queries)
        results.append(attend_with_bias(query, key, value, rows, columns, 0.125))
    assert torch.equal(*results)


def test_gradients_are_those_of_the_formula() -> None:
    shapes = {"query": (2, 6, 4), "key": (2, 6, 4), "value": (2, 6, 4), "rows": (2, 6, 2), "columns": (2, 6, 3)}
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(*s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes.values()]
    assert torch.autograd.gradcheck(lambda *p: attend_with_bias(*p, scale=0.5), parts)


def test_maps_need_not_be_square() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 15, 4, generator=generator) for _ in range(3))
    rows, columns = torch.randn(2, 15, 3, generator=generator), torch.randn(2, 15, 5, generator=generator)
    bias = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(2)
    expected = (0.5 * query @ key.transpose(1, 2) + bias).softmax(-1) @ value
    torch.testing.assert_close(attend_with_bias(query, key, value, rows, columns, 0.5), expected, rtol=1e-5, atol=1e-6)


def test_attention_without_bias_tables_runs() -> None:
    from segment_anything.modeling.image_encoder import Attention

    theirs = Attention(24, num_heads=3)
    holder, block = nn.Module(), nn.Module()
    block.attn, holder.blocks = copy.deepcopy(theirs), nn.ModuleList([block])
    block_attention(holder)
    assert largest_difference(block.attn, theirs, 1, 5, 24) < 1e-5


def test_bf16_is_close_and_its_backward_repeats_its_forward() -> None:
    ours, theirs = pair(16, 24, 3)
    x, upstream = torch.randn(1, 16, 16, 24), torch.randn(1, 16, 16, 24)
    expected, exact = run(theirs, x, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        output, rounded = run(ours, x, upstream)
    assert (output - expected).norm() < 0.02 * expected.norm()
    for name, gradient in rounded.items():
        assert (gradient - exact[name]).norm() < 0.05 * exact[name].norm() + 1e-3, name


# the encoder --------------------------------------------------------------------------------------------------------


def encoders(size: int) -> tuple[nn.Module, nn.Module]:
    """Ours and the package's, with the same weights; position tables are not zero."""
    from segment_anything.modeling.image_encoder import Attention

    ours = vit_sam(VIT, size, 2, DecoderShape(width=16, heads=2, mlp_width=32, iou_width=16)).image_encoder
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    theirs = copy.deepcopy(ours)
    for block in theirs.get_submodule("blocks").children():
        block.get_submodule("attn").__class__ = Attention
    return ours, theirs


def test_the_encoder_equals_the_package_also_in_inference() -> None:
    ours, theirs = encoders(128)
    image = torch.rand(2, 3, 128, 128)
    expected = theirs(image).detach()
    torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=1e-5)


def test_no_table_of_all_pairs_is_kept_for_backward() -> None:
    ours, theirs = encoders(512)
    image = torch.rand(1, 3, 512, 512)

    def largest_saved(encoder: Any) -> int:
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            encoder(image)
        return max(sizes)

    table = 3 * 1024 * 1024  # heads x tokens x tokens
    assert largest_saved(theirs) >= table
    assert largest_saved(ours) < table / 3  # the image is the largest


def test_every_block_changes_and_no_name_does() -> None:
    ours, theirs = encoders(64)
    kinds = {type(block.get_submodule("attn")).__name__ for block in ours.get_submodule("blocks").children()}
    assert kinds == {"BlockedAttention"}
    assert list(ours.state_dict()) == list(theirs.state_dict())
