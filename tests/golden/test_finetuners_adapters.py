"""Adapter blocks of the other fine-tuners against arrays computed by the official classes."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench.med2d import Med2dAdapter, add_adapters
from cfrbench.tuners import act_as
from cfrbench_tune import msa_adapter, samus, volume_encoder
from tests.golden.test_finetuners_sam import BOOK, close, parameters, take

TAGS = sorted({key.split("/")[2] for key in BOOK.keys("g/param/")})


def tags(method: str) -> list[str]:
    found = [tag for tag in TAGS if re.match(rf"{method}(_win\d+|_global)?$", tag)]
    assert found, f"the file has no block of {method}"
    return found


def load(module: nn.Module, tag: str) -> nn.Module:
    """Strict, so the names are the originals'; MSA alone calls its tables otherwise than the checkpoints do."""
    state = parameters(f"g/param/{tag}/")
    module.load_state_dict({re.sub(r"\brel_([hw])$", r"rel_pos_\1", name): value for name, value in state.items()})
    return module.eval()


def sam_block(tag: str, grid: int) -> nn.Module:
    """A block of SAM of the size that a tag's parameters have; global if its tables span the whole grid."""
    from segment_anything.modeling.image_encoder import Block

    shapes = {name: BOOK.arrays[f"g/param/{tag}/{name}"].shape for name in ("attn.qkv.weight", "mlp.lin1.weight")}
    width = shapes["attn.qkv.weight"][1]
    table = next(BOOK.arrays[key] for key in BOOK.keys(f"g/param/{tag}/attn.rel_") if key.endswith("_h"))
    side = (len(table) + 1) // 2
    block: nn.Module = Block(
        width,
        width // table.shape[1],
        mlp_ratio=(shapes["mlp.lin1.weight"][0] + 0.5) / width,  # the block rounds down
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=0 if side == grid else side,
        input_size=(grid, grid),
    )
    return block


def outputs(tag: str) -> list[str]:
    return [key for key in BOOK.keys("g/") if re.match(rf"g/{tag}(_\w+)?$", key)]


@pytest.mark.parametrize("tag", tags("msa"))
@torch.no_grad()
def test_msa_block(tag: str) -> None:
    x = take("g/x")
    block = msa_adapter.adapt_block(sam_block(tag, x.shape[1]))
    close(load(block, tag)(x), f"g/{tag}")


@pytest.mark.parametrize("tag", [tag for tag in tags("samus") if tag.startswith("samus_")])
@torch.no_grad()
def test_samus_block(tag: str) -> None:
    x, cnn = take("g/x"), take("g/cnn")
    block = sam_block(tag, x.shape[1])
    adapted = act_as(block, samus.WindowBlock) if block.window_size else samus.adapt_block(block, x.shape[1])
    tokens, branch = load(adapted, tag)(x, cnn)
    close(tokens, f"g/{tag}_x")
    close(branch, f"g/{tag}_cnn")


def channels(tag: str) -> tuple[int, ...]:
    """From the first convolution on, in order."""
    names = [key for key in BOOK.keys(f"g/param/{tag}/") if BOOK.arrays[key].ndim == 4]
    sizes = [BOOK.arrays[name].shape[:2] for name in sorted(names, key=lambda name: "inc" not in name)]
    return (sizes[0][1], *(out for out, _ in sizes))


@torch.no_grad()
def test_samus_branch_and_positions() -> None:
    branch = samus.ConvolutionalEmbedding(channels("samus_cnn_embed")[1:])
    close(load(branch, "samus_cnn_embed")(take("g/image")).permute(0, 2, 3, 1), "g/samus_cnn_embed")
    (positions,) = BOOK.keys("g/pos")
    halvings = load(samus.Halvings(channels("samus_post_pos")), "samus_post_pos")
    close(halvings(take(positions).permute(0, 3, 1, 2)).permute(0, 2, 3, 1), "g/samus_post_pos")


@pytest.mark.parametrize("tag", tags("med2d"))
@torch.no_grad()
def test_sam_med2d_block_and_its_adapter(tag: str) -> None:
    x = take("g/x")
    encoder = nn.Module()
    encoder.add_module("blocks", nn.ModuleList([sam_block(tag, x.shape[1])]))
    encoder.register_parameter("pos_embed", nn.Parameter(x[:1]))
    add_adapters(encoder)
    block: Any = load(encoder.get_submodule("blocks.0"), tag)
    assert isinstance(block.Adapter, Med2dAdapter)
    for key in outputs(tag):
        close(block.Adapter(x) if key.endswith("adapter_only") else block(x), key)


@torch.no_grad()
def test_3dsam_adapter_and_attention() -> None:
    x = take("g/x3d")
    middle, width = BOOK.arrays["g/param/3dsam_adapter/linear1.weight"].shape
    adapter = volume_encoder.VolumeAdapter(width, middle)
    close(load(adapter, "3dsam_adapter")(x), "g/3dsam_adapter")
    close(load(attention("3dsam_attn"), "3dsam_attn")(x), "g/3dsam_attention")


def attention(tag: str) -> nn.Module:
    """SAM's attention turned into one for cubes, by the block it stands in."""
    table = BOOK.arrays[f"g/param/{tag}/rel_pos_h"]
    from segment_anything.modeling.image_encoder import Block

    width, side = BOOK.arrays[f"g/param/{tag}/proj.weight"].shape[0], (len(table) + 1) // 2
    block = Block(width, width // table.shape[1], use_rel_pos=True, window_size=side, input_size=(side, side))
    part: nn.Module = volume_encoder.adapt_block(block, side, shifted=False).attn
    return part


@torch.no_grad()
def test_msa_resizes_its_table_bicubically() -> None:
    for key in BOOK.keys("f/msa_"):
        resized: Tensor = msa_adapter.resized_bicubic(take("f/pos_in"), BOOK.arrays[key].shape[1])
        close(resized, key, atol=1e-6)
