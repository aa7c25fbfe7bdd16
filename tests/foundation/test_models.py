"""MedSAM, MobileSAM and SAM-Med2D: shapes, pixels, adapters, what their files must hold."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench import pretrained
from cfrbench.contracts import Promptable
from cfrbench.errors import ConfigError, DataError, WeightsError
from cfrbench.lean import _recomputing_class
from cfrbench.med2d import add_adapters
from cfrbench.pretrained import Pretrained, Release
from cfrbench.promptable import PIXEL_MEAN, PIXEL_STD, ViTShape, mask_head, standardise_pixels, vit_sam
from cfrbench.testing import check_model
from cfrbench_foundation.medsam import MedSam
from cfrbench_foundation.mobile_sam import MobileSam
from cfrbench_foundation.sam import SamViTB
from cfrbench_foundation.sam_med2d import SamMed2d

SHAPE = ViTShape(width=32, depth=2, heads=2, global_blocks=(1,), window=2)
DRAWS = torch.Generator().manual_seed(0)


class MiniMedSam(MedSam):
    name = "mini-medsam"
    kind = "a SAM of 2 blocks and width 32"
    release = Release("mini.pth", "https://host/mini.pth")
    shape = SHAPE


class MiniMed2d(SamMed2d):
    name = "mini-med2d"
    release = Release("mini.pth")
    shape = SHAPE


def saved(path: Path, model: nn.Module, **extra: Tensor) -> dict[str, Tensor]:
    """A checkpoint with random values in every tensor of ``model``."""
    floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    drawn = {name: torch.rand_like(tensor) - 0.5 for name, tensor in floats.items() if "running_var" not in name}
    state = model.state_dict() | drawn
    torch.save({"model": state | extra}, path)
    return state


# pixels -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pixels_are_standardised_as_sam_does_and_only_once() -> None:
    plain = nn.Conv2d(3, 2, 1)
    taking_units = standardise_pixels(copy.deepcopy(plain))
    assert taking_units.state_dict().keys() == plain.state_dict().keys()
    images = torch.rand(2, 3, 4, 4, generator=DRAWS)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    expected = plain((images * 255 - mean) / std)
    torch.testing.assert_close(taking_units(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(taking_units)(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [MedSam, MobileSam, SamMed2d])
def test_crops_are_scaled_to_the_unit_interval(cls: type[Pretrained]) -> None:
    crops = 40 * torch.randn(2, 12, 10, 8, generator=DRAWS) - 7
    scaled = cls().normalise(crops)
    assert scaled.amin((1, 2, 3)).tolist() == [0.0, 0.0]
    assert scaled.amax((1, 2, 3)).tolist() == [1.0, 1.0]
    assert cls.intensity == "gamma"  # the augmentation for values in [0, 1]


# MobileSAM ----------------------------------------------------------------------------------------------------------


def mobile(size: int) -> Promptable:
    torch.manual_seed(0)
    return MobileSam(MobileSam.Config(input_size=size)).architecture(4)


@torch.no_grad()
def test_the_encoder_is_the_packages_with_another_stem() -> None:
    encoder: Any = mobile(128).image_encoder
    theirs: Any = type(encoder).__mro__[1](
        img_size=32, embed_dims=[64, 128, 160, 320], depths=[2, 2, 6, 2], num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7], drop_path_rate=0.0,
    )  # fmt: skip
    for index, (inward, outward) in {0: (3, 32), 2: (32, 64)}.items():
        theirs.patch_embed.seq[index].c = nn.Conv2d(inward, outward, 3, 2, 1, bias=False)
    theirs.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, 128, 128, generator=DRAWS)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    tokens = theirs.eval().patch_embed((images * 255 - mean) / std)
    for stage in theirs.layers:
        tokens = stage(tokens)
    expected = theirs.neck(tokens.unflatten(1, (8, 8)).permute(0, 3, 1, 2))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)


def test_mobile_sam_loads_its_file_without_the_head_that_nothing_uses(tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    head = {"image_encoder.head.weight": torch.zeros(1000, 320), "image_encoder.norm_head.bias": torch.zeros(320)}
    state = saved(path, mobile(64), **head)
    model = MobileSam(MobileSam.Config(input_size=96, checkpoint=path)).build(4)
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)
    with torch.no_grad():
        assert model.eval()(torch.rand(1, 3, 96, 96)).shape == (1, 4, 24, 24)


# MedSAM -------------------------------------------------------------------------------------------------------------


def test_medsam_is_not_the_released_sam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sam.pth"
    saved(path, vit_sam(SHAPE, 128, 4))
    MiniMedSam(MiniMedSam.Config(checkpoint=path, input_size=64)).build(2)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(pretrained, "RELEASED", {"SAM ViT-B": digest})
    with pytest.raises(WeightsError, match="released checkpoint of SAM ViT-B, which has the shapes of MedSAM but not"):
        MiniMedSam(MiniMedSam.Config(checkpoint=path, input_size=64)).build(2)


@pytest.mark.parametrize(("depth", "width", "found"), [(24, 1024, "SAM ViT-L"), (32, 1280, "SAM ViT-H")])
def test_a_larger_sam_is_refused_by_name(tmp_path: Path, depth: int, width: int, found: str) -> None:
    path = tmp_path / "large.pth"
    blocks = {f"image_encoder.blocks.{index}.norm1.bias": torch.zeros(1) for index in range(depth)}
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 1, 1, width), **blocks}, path)
    for cls in (SamViTB, MedSam):
        with pytest.raises(WeightsError, match=f"is {found}, but SAM ViT-B was asked for. Name the matching model"):
            cls(cls.Config(checkpoint=path)).build(2)


# SAM-Med2D ----------------------------------------------------------------------------------------------------------


def test_adapters_are_loaded_and_may_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    state = saved(path, MiniMed2d(MiniMed2d.Config(input_size=128)).architecture(4))
    image = torch.rand(1, 3, 64, 64, generator=DRAWS)
    embeddings = []
    for adapters in (True, False):
        model = MiniMed2d(MiniMed2d.Config(input_size=64, checkpoint=path, adapters=adapters)).build(4)
        own = model.state_dict()
        names = {name for name in state if ".Adapter." in name}
        assert len(names) == 2 * 6
        assert own.keys() == (state.keys() if adapters else state.keys() - names)
        assert all(torch.equal(own[name], state[name]) for name in names & own.keys())
        with torch.no_grad():
            embeddings.append(model.image_encoder(image))
    assert not torch.allclose(*embeddings)


def test_a_sam_without_adapters_is_not_sam_med2d(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    saved(path, vit_sam(SHAPE, 128, 4))
    with pytest.raises(WeightsError, match="but SAM-Med2D was asked for"):
        MiniMed2d(MiniMed2d.Config(input_size=64, checkpoint=path)).build(2)


def test_adapters_need_an_even_grid() -> None:
    with pytest.raises(ConfigError, match="3 x 3 has no half"):
        add_adapters(vit_sam(SHAPE, 48, 2).image_encoder)
    with pytest.raises(ConfigError, match="7 x 7 has no half"):
        MiniMed2d(MiniMed2d.Config.model_construct(input_size=112, adapters=True, recompute=False)).architecture(2)


# the contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "size"), [(MiniMedSam, 64), (MiniMed2d, 64), (MobileSam, 64)])
def test_models_keep_the_contract_with_a_file(cls: type[Pretrained], size: int, tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    torch.manual_seed(0)
    torch.save(cls(cls.Config(input_size=size)).architecture(4).state_dict(), path)
    check_model(cls(cls.Config(input_size=size, checkpoint=path)))


# what every model refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 40, 1000])
def test_an_image_that_no_patches_fill_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"An image of {size} pixels .* multiple of 16, [0-9]+ for example"):
        vit_sam(SHAPE, size, 2)


@pytest.mark.parametrize("classes", [0, 256, 1000])
def test_more_classes_than_a_label_can_hold_are_refused(classes: int) -> None:
    with pytest.raises(DataError, match=f"{classes} classes do not fit: labels have 8 bits"):
        mask_head(classes)


def test_recomputation_is_an_option_of_every_vit() -> None:
    with torch.device("meta"):
        for cls in (SamViTB, MedSam, SamMed2d):
            model = cls(cls.Config(input_size=64, recompute=True)).architecture(2)
            assert isinstance(model.image_encoder, _recomputing_class())


# getting files ------------------------------------------------------------------------------------------------------


def test_a_file_without_an_address_says_where_it_is_offered(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no address.*OpenGVLab/SAM-Med2D.*model get sam-med2d --from FILE"):
        SamMed2d.fetch(tmp_path)
    with pytest.raises(WeightsError, match=r"are missing.*model get sam-med2d --from FILE"):
        SamMed2d(weights=tmp_path / "none.pth").build(2)


def test_a_file_that_is_here_is_adopted_after_it_was_checked(tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine.pth", tmp_path / "weights"
    saved(mine, vit_sam(SHAPE, 64, 4))
    target = MiniMedSam.adopt(mine, folder)
    assert target == folder / "mini.pth"
    assert target.read_bytes() == mine.read_bytes()
    with pytest.raises(WeightsError, match="but SAM-Med2D was asked for"):
        MiniMed2d.adopt(mine, folder / "other")
    assert not (folder / "other").exists()


def test_a_fetched_file_is_checked_by_its_shapes_where_no_digest_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(url: str, target: Path, sha256: str | None, progress: Any) -> Path:
        assert (url, sha256) == ("https://host/mini.pth", None)
        saved(target, vit_sam(ViTShape(width=48, depth=2, heads=2, global_blocks=(1,), window=2), 64, 4))
        return target

    monkeypatch.setattr(pretrained, "download", served)
    with pytest.raises(WeightsError, match="is a SAM of 2 blocks and width 48"):
        MiniMedSam.fetch(tmp_path)
