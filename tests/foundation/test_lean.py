"""Less memory, the same numbers: recomputed blocks, halved frozen weights, frozen prefixes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfrbench import pipeline, registry
from cfrbench.config import RunConfig
from cfrbench.contracts import Promptable
from cfrbench.lean import halve_frozen, recompute_blocks
from cfrbench.promptable import DecoderShape, ViTShape, freeze, vit_sam
from cfrbench.recipes import open_source

VIT = ViTShape(width=32, depth=4, heads=2, global_blocks=(1, 3), window=3)
DECODER = DecoderShape(width=16, heads=2, mlp_width=32, iou_width=16, mask_channels=4)
IMAGE = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def model() -> Promptable:
    torch.manual_seed(0)
    built = vit_sam(VIT, 96, 2, DECODER)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "pos" in name:
                parameter.normal_(std=0.2)
    return built


def with_lora() -> Promptable:
    built = model()
    registry.load("tune", "lora")().adapt(built)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return built


def run(network: nn.Module, *, half: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one step."""
    network.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits: Tensor = network(IMAGE)
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()  # type: ignore[no-untyped-call]
    return logits.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def require_equal(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(gradient, theirs[1][name]) for name, gradient in ours[1].items())


def saved_in_encoder(network: Promptable) -> int:
    """Numbers that the encoder keeps for backward and that are not its weights."""
    sizes: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | {IMAGE.untyped_storage().data_ptr()}:
            sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = network.image_encoder(IMAGE)
    assert kept.shape[0] == 2
    return sum(sizes.values())


# recomputation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [model, with_lora])
@pytest.mark.parametrize("half", [False, True])
def test_recomputed_blocks_give_the_same_bits(make: Callable[[], Promptable], half: bool) -> None:
    network = make()
    expected = run(network, half=half)
    recompute_blocks(network.image_encoder)
    require_equal(run(network, half=half), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert torch.equal(network(IMAGE), expected[0])


def test_dropout_in_a_recomputed_block_repeats_its_draws() -> None:
    network = model()
    encoder: Any = network.image_encoder
    encoder.blocks[1] = nn.Sequential(encoder.blocks[1], nn.Dropout(0.5))
    twin = copy.deepcopy(network)
    recompute_blocks(network.image_encoder)
    results = []
    for each in (network, twin):
        torch.manual_seed(1)
        results.append(run(each))
    require_equal(*results)


def test_recomputation_keeps_one_map_a_block() -> None:
    network = with_lora()
    before = saved_in_encoder(network)
    recompute_blocks(network.image_encoder)
    assert saved_in_encoder(network) < before / 3


# halved weights -----------------------------------------------------------------------------------------------------


def test_halved_frozen_weights_give_the_bits_of_autocast() -> None:
    network = with_lora()
    expected = run(network, half=True)
    names = halve_frozen(network.image_encoder, torch.bfloat16)
    assert names
    require_equal(run(network, half=True), expected)
    linear = {n for n, layer in network.image_encoder.named_modules() if type(layer) is nn.Linear}
    assert {n for n in linear if n.endswith(("mlp.lin1", "mlp.lin2", "attn.proj"))} <= set(names)


def test_what_trains_is_saved_or_merged_stays_in_full_precision() -> None:
    network = with_lora()
    names = halve_frozen(network.image_encoder, torch.bfloat16, keep={"blocks.0.mlp.lin1"})
    state = network.image_encoder.state_dict()
    halved = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    assert {name for name, tensor in state.items() if tensor.dtype == torch.bfloat16} == halved & state.keys()
    assert "blocks.0.mlp.lin1" not in names
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert all(p.dtype == torch.float32 for p in network.parameters() if p.requires_grad)
    tuner = registry.load("tune", "lora")()
    assert all(tensor.dtype == torch.float32 for tensor in tuner.export(network).values())


def test_an_encoder_that_trains_is_not_halved() -> None:
    assert halve_frozen(model().image_encoder, torch.bfloat16) == []


# frozen prefix ------------------------------------------------------------------------------------------------------


def test_a_frozen_prefix_keeps_nothing_for_backward() -> None:
    whole = saved_in_encoder(model())
    frozen = model()
    freeze(frozen.image_encoder)
    assert saved_in_encoder(frozen) == 0
    assert not frozen.image_encoder(IMAGE).requires_grad
    last: Any = frozen.image_encoder
    last.blocks[3].requires_grad_(True)
    assert 0 < saved_in_encoder(frozen) < 0.4 * whole


def test_a_frozen_prefix_does_not_change_the_gradients_behind_it() -> None:
    network = model()
    expected = run(network)
    freeze(network.image_encoder)
    logits, gradients = run(network)
    assert torch.equal(logits, expected[0])
    assert all(name.startswith(("mask_decoder", "prompt_encoder")) for name in gradients)
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in gradients.items())


# in the pipeline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "decoder-only", "linear-probe"])
def test_fine_tuning_in_bf16_is_the_same_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"data.phantom.train": 2, "data.phantom.test": 1, "data.phantom.shape": (24, 16, 8), "tuning.steps": 2,
              "compute.precision": "bf16", "compute.threads": 1}  # fmt: skip
    source = open_source("phantom", None, values)
    bench = pipeline.Bench.of(source, RunConfig(preset="smoke", set=values).settings(source.protocol("smoke")))
    cases, exported, halved = list(source.split().train)[:1], [], []

    def counted(*arguments: Any, **options: Any) -> list[str]:
        halved.extend(names := halve_frozen(*arguments, **options))
        return names

    for halve in (counted, lambda *_, **__: []):
        monkeypatch.setattr(pipeline, "halve_frozen", halve)
        parts = [
            registry.load(kind, given)() for kind, given in (("concat", "grid"), ("model", "tiny"), ("tune", name))
        ]
        labeller = pipeline.fine_tune(bench, cases, *parts, seed=0)
        exported.append(parts[2].export(labeller.network.model))
    assert halved
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(tensor, exported[1][key]) for key, tensor in exported[0].items())
    assert all(tensor.dtype == torch.float32 for tensor in exported[0].values() if tensor.is_floating_point())
