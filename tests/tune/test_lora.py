"""LoRA: nothing changes at first, only the right things train, export and merge keep what was learned."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfrbench.contracts import FoundationModel, Promptable
from cfrbench.errors import PluginError, WeightsError
from cfrbench.promptable import FrozenBatchNorm2d, vit_sam
from cfrbench_foundation.lite_medsam import LiteMedSam
from cfrbench_foundation.sam import SamViTB
from cfrbench_foundation.tiny import TinySam
from cfrbench_tune.lora import Lora, SplitQKV

SIZE = 32  # pixels
#: what the official code flags trainable although no gradient ever reaches it
SILENT = ("iou_prediction_head", "point_embeddings", "not_a_point_embed", "mask_downscaling")


def foundation(name: str) -> FoundationModel:
    return (
        TinySam(TinySam.Config(input_size=SIZE)) if name == "tiny" else LiteMedSam(LiteMedSam.Config(input_size=SIZE))
    )


def images() -> Tensor:
    return torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)


def adapted(name: str, classes: int = 3, **values: object) -> tuple[Promptable, Lora, list[nn.Parameter]]:
    torch.manual_seed(0)
    model, tuner = foundation(name).build(classes), Lora(Lora.Config(**values))
    return model, tuner, tuner.adapt(model)


def train(model: Promptable, parameters: list[nn.Parameter], steps: int = 3) -> None:
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    target = torch.randint(0, 3, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model.train()
        logits = F.interpolate(model(images()), size=(SIZE, SIZE), mode="bilinear")
        optimiser.zero_grad()
        F.cross_entropy(logits, target).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


@torch.no_grad()
def output(model: Promptable) -> Tensor:
    logits: Tensor = model.eval()(images())
    return logits


def classes(model: Promptable) -> dict[str, type[nn.Module]]:
    """The class of every part; batch norms stay frozen, which is no other class to a reader of checkpoints."""
    swap: dict[type[nn.Module], type[nn.Module]] = {FrozenBatchNorm2d: nn.BatchNorm2d}
    return {name: swap.get(type(part), type(part)) for name, part in model.named_modules()}


BOTH = pytest.mark.parametrize("name", ["tiny", "lite-medsam"])


@BOTH
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    plain = foundation(name).build(3)
    before = output(plain)
    Lora().adapt(plain)
    torch.testing.assert_close(output(plain), before, rtol=0, atol=1e-6)


@BOTH
def test_only_what_is_returned_trains(name: str) -> None:
    model, _, parameters = adapted(name)
    before = copy.deepcopy(model.state_dict())
    flagged = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in parameters} == {id(p) for n, p in model.named_parameters() if n in flagged}
    train(model, parameters)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {n for n in flagged if not any(part in n for part in SILENT)}
    assert all(".lora_" in n for n in changed if n.startswith("image_encoder."))


@BOTH
def test_every_block_is_adapted_once(name: str) -> None:
    model, _, _ = adapted(name)
    layers = {n.rpartition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    if name == "tiny":
        assert layers == {f"image_encoder.blocks.{i}.attn.qkv.{p}_proj" for i in range(2) for p in "qv"}
    else:
        depths = {1: 2, 2: 6, 3: 2}
        assert layers == {f"image_encoder.layers.{s}.blocks.{i}.attn.qkv" for s, d in depths.items() for i in range(d)}


@BOTH
def test_merging_keeps_the_output_and_gives_the_plain_classes_back(name: str) -> None:
    model, tuner, parameters = adapted(name)
    plain = foundation(name).build(3)
    start = output(model)
    train(model, parameters)
    tuned = output(model)
    assert (tuned - start).abs().max() > 0.1
    tuner.merge(model)
    torch.testing.assert_close(output(model), tuned, rtol=0, atol=1e-5 * float(tuned.abs().max().clamp(min=1)))
    assert classes(model) == classes(plain)
    plain.load_state_dict(model.state_dict())  # strict: names and shapes of the pre-trained model
    assert torch.equal(output(plain), output(model))
    tuner.merge(model)
    assert torch.equal(output(plain), output(model))


@BOTH
def test_export_and_restore_round_trip(name: str) -> None:
    model, tuner, parameters = adapted(name, rank=2)
    train(model, parameters)
    tensors = tuner.export(model)
    kept = {n: t.clone() for n, t in tensors.items()}
    fresh, other, _ = adapted(name, rank=2)
    assert not torch.equal(output(fresh), output(model))
    other.restore(fresh, tensors)
    assert torch.equal(output(fresh), output(model))
    train(fresh, [p for p in fresh.parameters() if p.requires_grad])
    assert all(torch.equal(tensors[n], kept[n]) for n in kept)  # copies: training on does not reach them
    assert not any("image_encoder" in n and "lora" not in n for n in tensors)
    assert all(t.is_contiguous() and not t.requires_grad for t in tensors.values())


def test_restored_training_goes_on_bit_for_bit() -> None:
    model, tuner, parameters = adapted("tiny")
    train(model, parameters)
    tensors = tuner.export(model)
    again, other, trainable = adapted("tiny")
    other.restore(again, tensors)
    train(model, parameters)
    train(again, trainable)
    assert torch.equal(output(model), output(again))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 5}, "stands only in"),
        ({"rank": 8}, r"is \(4, 32\) in the model and \(8, 32\) there"),
        ({"targets": ("q", "k", "v")}, "k_proj.* stands only in the tensors"),
    ],
)
def test_tensors_of_another_setting_are_refused(change: dict[str, object], message: str) -> None:
    model, tuner, _ = adapted("tiny")
    before = output(model)
    other_model, other, _ = adapted("tiny", **change)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=message):
        tuner.restore(model, other.export(other_model))
    assert torch.equal(output(model), before)


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(4, None, 1.0), (8, None, 1.0), (4, 1.0, 0.25), (2, 6.0, 3.0)])
@torch.no_grad()
def test_scale_is_alpha_over_rank(rank: int, alpha: float | None, scale: float) -> None:
    model, _, _ = adapted("tiny", rank=rank, alpha=alpha)
    layer = model.image_encoder.get_submodule("blocks.0.attn.qkv")
    x = torch.randn(5, 32)
    base = layer(x)
    up, down = (layer.get_parameter(f"v_proj.lora_{matrix}.default.weight") for matrix in "BA")
    up.normal_()
    expected = base + F.pad(scale * x @ down.T @ up.T, (64, 0))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_splitting_a_fused_layer_is_exact() -> None:
    fused = nn.Linear(12, 36)
    split = SplitQKV(fused)
    x = torch.randn(7, 12)
    torch.testing.assert_close(split(x), fused(x), rtol=0, atol=1e-6)
    assert torch.equal(split.fused().weight, fused.weight)
    assert torch.equal(split.fused().bias, fused.bias)


def test_adapting_twice_is_refused() -> None:
    model, tuner, _ = adapted("tiny")
    with pytest.raises(PluginError, match="no plain fused qkv"):
        tuner.adapt(model)


@pytest.mark.parametrize("encoder", [None, "resnet"])
def test_unknown_encoders_are_refused(encoder: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(Lora().refuses(model) is None for model in (TinySam(), LiteMedSam(), SamViTB()))
    monkeypatch.setattr(TinySam, "encoder", encoder)
    reason = Lora().refuses(TinySam())
    assert reason is not None
    assert "tiny" in reason
    assert repr(encoder) in reason


@pytest.mark.parametrize(
    ("size", "classes", "total", "trainable", "effective"),
    [
        (1024, 1, 93_602_286, 3_931_374, 3_793_312),
        (1024, 13, 95_286_138, 5_615_226, 5_474_080),
        (1024, 8, 94_584_533, 4_913_621, 4_773_760),
        (512, 8, 92_192_469, 4_913_621, 4_773_760),
    ],
)
def test_parameter_counts_of_cfr_and_samed(size: int, classes: int, total: int, trainable: int, effective: int) -> None:
    with torch.device("meta"):
        model = vit_sam(SamViTB.shape, size, classes + 1)
        parameters = Lora().adapt(model)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in parameters) == trainable
    live = [(n, p) for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in SILENT)]
    assert sum(p.numel() for _, p in live) == effective
    assert sum(p.numel() for n, p in live if ".lora_" in n) == 147_456
    Lora().merge(model)
    assert sum(p.numel() for p in model.parameters()) == total - 147_456
