"""Our port of Medical SAM Adapter to TinyViT: adapters stand where the ViT has them, and nothing else changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cfrbench.tuners import Bottleneck
from cfrbench_tune.msa_adapter import SCALE, adapt_tiny_vit
from tests.tune.models import adapted, foundation, tuner_of

SIDE, WIDTH = 8, 128


def plain_block(encoder: nn.Module) -> Any:
    return encoder.get_submodule("layers.1.blocks.0")


@torch.no_grad()
def test_adapters_follow_the_attention_and_stand_beside_the_mlp() -> None:
    """The package's own block, its two branches computed with the adapters' formulas."""
    torch.manual_seed(0)
    network = foundation("lite-medsam").build(2)
    block = plain_block(network.image_encoder).eval()
    block.input_resolution = (SIDE, SIDE)
    x = torch.randn(2, SIDE * SIDE, WIDTH)
    attended = block(x)  # so that the attention's cache of biases is made

    space, beside = Bottleneck(WIDTH, residual=True), Bottleneck(WIDTH)
    handles = [
        block.attn.register_forward_hook(lambda _module, _inputs, output: space(output)),
        block.mlp.register_forward_hook(lambda module, inputs, output: output + SCALE * beside(module.norm(inputs[0]))),
    ]
    expected = block(x)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(expected, attended, atol=1e-3)

    adapt_tiny_vit(network.image_encoder)
    block.attn.proj.Space_Adapter.load_state_dict(space.state_dict())
    block.mlp.fc1.MLP_Adapter.load_state_dict(beside.D_fc1.state_dict())
    block.mlp.fc2.MLP_Adapter.load_state_dict(beside.D_fc2.state_dict())
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_pretrained_names_and_weights_stay() -> None:
    model = foundation("lite-medsam")
    torch.manual_seed(0)
    before: dict[str, Tensor] = model.build(2).image_encoder.state_dict()
    after = adapted(tuner_of("msa-adapter"), model, 2).image_encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    added = after.keys() - before.keys()
    assert all("Adapter" in name for name in added)
    assert len(added) == 10 * 8  # ten transformer blocks, two adapters of two layers each


@torch.no_grad()
def test_silent_adapters_leave_the_encoder_as_it_was() -> None:
    model = foundation("lite-medsam")
    torch.manual_seed(0)
    plain = model.build(2)
    network = adapted(tuner_of("msa-adapter"), model, 2)
    for name, parameter in network.image_encoder.named_parameters():
        if "Adapter" in name and ("D_fc2" in name or "fc2.MLP_Adapter" in name):
            parameter.zero_()
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(network.image_encoder(image), plain.image_encoder(image), rtol=1e-4, atol=1e-5)
