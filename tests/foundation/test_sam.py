"""SAM's plug-in: sizes, missing and wrong weights, what a checkpoint puts where."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfrbench import pretrained, weights
from cfrbench.config import validate
from cfrbench.contracts import Promptable
from cfrbench.errors import ConfigError, WeightsError
from cfrbench.pretrained import Release
from cfrbench.promptable import ViTShape, vit_sam
from cfrbench_foundation.sam import Sam, SamViTB, SamViTH, SamViTL

SIZES = [SamViTB, SamViTL, SamViTH]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CFRBENCH_WEIGHTS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("cls", SIZES)
def test_missing_weights_name_the_command_that_gets_them(cls: type[Sam], folder: Path) -> None:
    for ask in (cls().identity, lambda: cls().build(2)):
        with pytest.raises(WeightsError, match=f"weights of {cls.title} are missing") as caught:
            ask()
        assert (
            f"curl --location --create-dirs --continue-at - --output {folder / cls.release.file} {cls.release.url}"
            in str(caught.value)
        )
        assert f"model.{cls.name}.checkpoint=" in str(caught.value)


@pytest.mark.parametrize(("cls", "expected"), [(SamViTB, 93_735_472), (SamViTL, 312_342_832), (SamViTH, 641_090_608)])
def test_released_sizes(cls: type[Sam], expected: int) -> None:
    with torch.device("meta"):
        model = vit_sam(cls.shape, 1024, 4)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert weights.recognise(model.state_dict()) == cls.kind


def test_a_smaller_input_shrinks_position_tables_only() -> None:
    with torch.device("meta"):
        large, small = (vit_sam(SamViTB.shape, size, 4).state_dict() for size in (1024, 512))
    changed = {name for name in large if large[name].shape != small[name].shape}
    tables = {f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (2, 5, 8, 11) for axis in "hw"}
    assert changed == tables | {"image_encoder.pos_embed"}


@pytest.mark.parametrize("size", [16, 1000, -64])
def test_impossible_input_sizes_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="input_size"):
        validate(SamViTB.Config, {"input_size": size}, "the options of model.sam-vit-b")


# a miniature stands in for the released checkpoint, through the same code -------------------------------------------


class MiniSam(Sam):
    name = "mini"
    title = "mini SAM"
    kind = "a SAM of 2 blocks and width 32"
    release = Release("mini.pth", "https://host/mini.pth", "000000")
    shape = ViTShape(width=32, depth=2, heads=2, global_blocks=(1,), window=2)


def save_mini(path: Path, input_size: int = 128) -> dict[str, Tensor]:
    state: dict[str, Tensor] = vit_sam(MiniSam.shape, input_size, 4).state_dict()
    state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    torch.save(state, path)
    return state


def build(path: Path, classes: int = 2, **values: object) -> tuple[Promptable, MiniSam]:
    foundation = MiniSam(MiniSam.Config(checkpoint=path, **values))
    return foundation.build(classes), foundation


@pytest.mark.parametrize("size", [128, 64])
def test_build_loads_and_resizes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "own.pth"
    state = save_mini(path)
    model, foundation = build(path, input_size=size)
    assert foundation.input_size == size
    own = model.state_dict()
    same = {name for name, tensor in own.items() if torch.equal(tensor, state[name])}
    positions = {"image_encoder.pos_embed", *(f"image_encoder.blocks.1.attn.rel_pos_{axis}" for axis in "hw")}
    assert positions <= same if size == 128 else positions.isdisjoint(same)
    assert "image_encoder.blocks.0.attn.rel_pos_h" in same
    assert "mask_decoder.output_hypernetworks_mlps.1.layers.2.bias" in same
    with torch.no_grad():
        assert model(torch.randn(2, 3, size, size)).shape == (2, 2, size // 4, size // 4)


def test_intended_head_is_drawn_from_the_global_generator(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    state = save_mini(path)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(
            build(path, classes=4, input_size=128, head="intended")[0].mask_decoder.get_parameter("mask_tokens.weight")
        )
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    official = build(path, classes=4, input_size=128)[0].mask_decoder.get_parameter("mask_tokens.weight")
    assert torch.equal(official, state["mask_decoder.mask_tokens.weight"])


def test_identity_is_the_digest_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    save_mini(path)
    foundation = MiniSam(weights=path)
    first = foundation.identity()
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    save_mini(path, 64)
    assert foundation.identity() != first


def test_the_released_name_must_carry_the_released_digest(folder: Path) -> None:
    save_mini(folder / MiniSam.release.file)
    with pytest.raises(WeightsError, match=r"expected 000000\.\.\."):
        MiniSam().build(2)


def test_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    save_mini(path)
    with pytest.raises(WeightsError, match="is a SAM of 2 blocks and width 32, but SAM ViT-B was asked for"):
        SamViTB(weights=path).build(2)


def test_z_scored_input_stays_as_it_is() -> None:
    crops = torch.randn(2, 5, 6, 7)
    assert torch.equal(SamViTB().normalise(crops), crops)


def test_fetch_asks_for_the_released_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(pretrained, "download", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(pretrained, "read_checkpoint", lambda path, *_: (path.write_bytes(b"") and {}) or {})
    SamViTB.fetch()
    target = folder / "sam_vit_b_01ec64.pth"
    assert calls == [(SamViTB.release.url, target, weights.RELEASED["SAM ViT-B"], None)]
