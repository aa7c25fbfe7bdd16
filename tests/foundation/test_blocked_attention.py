"""Attention in blocks gives the numbers and the gradients of attention at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cfrbench import blocked_attention
from cfrbench.promptable import DecoderShape, ViTShape, vit_sam

VIT = ViTShape(width=24, depth=3, heads=3, global_blocks=(0, 2), window=3)


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


def run(encoder: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    embedding: Tensor = encoder(image)
    (embedding * torch.linspace(-1, 1, embedding.numel()).view_as(embedding)).sum().backward()  # type: ignore[no-untyped-call]
    return embedding.detach(), {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("queries", [1, 10, 25])  # a row is 8 tokens: one row at a time, one again, three
def test_blocks_equal_the_whole(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "QUERIES", queries)
    ours, theirs = encoders(128)
    image = torch.rand(2, 3, 128, 128)
    embedding, gradients = run(ours, image)
    expected, expected_gradients = run(theirs, image)
    torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm()
        assert error <= 1e-4 * expected_gradients[name].norm() + 1e-5, name
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=1e-5)


def test_no_table_of_all_pairs_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "QUERIES", 64)
    ours, theirs = encoders(512)
    image = torch.rand(1, 3, 512, 512)

    def largest_saved(encoder: nn.Module) -> int:
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            encoder(image)
        return max(sizes)

    table = 3 * 1024 * 1024  # heads x tokens x tokens
    assert largest_saved(theirs) >= table
    assert largest_saved(ours) < table / 2


def test_only_global_blocks_change() -> None:
    ours, _ = encoders(64)
    names = [type(block.get_submodule("attn")).__name__ for block in ours.get_submodule("blocks").children()]
    assert names == ["BlockedAttention", "Attention", "BlockedAttention"]
