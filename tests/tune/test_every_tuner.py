"""Laws that every registered fine-tuner keeps on every model it fits; a new one is tested by being registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfrbench import registry
from cfrbench.lean import halve_frozen, recompute_blocks
from cfrbench.losses import ce_dice
from cfrbench.testing import check_tuner
from tests.tune.models import FORMS, SIDES, adapted, foundation, images, tuner_of, words

CLASSES = 8
#: flagged trainable by the originals, and never reached by a gradient
SILENT = {
    "": ("iou_prediction_head", "point_embeddings", "not_a_point_embed", "mask_downscaling"),
    "msa-adapter": ("Depth_Adapter",),
    "sam3d-adapter": ("cross_attn_token_to_image",),
}
#: with prompts, one of SAM's own masks answers
PROMPTED = ("mask_tokens", "output_hypernetworks_mlps", "no_mask_embed", "point_embeddings", "not_a_point_embed")


@pytest.mark.parametrize(
    ("name", "options", "model_name"),
    # other forms on the smallest family alone: what they change has nothing to do with the encoder
    [(name, options, model) for name, options in FORMS for model in SIDES if model == "tiny" or not options],
    ids=words,
)
def test_gradients_go_where_they_should(name: str, options: dict[str, Any], model_name: str) -> None:
    """Every trainable tensor gets a gradient, every frozen one stays bit-equal, and eight classes are told apart."""
    tuner, model = tuner_of(name, **options), foundation(model_name)
    if tuner.refuses(model):
        return
    network = adapted(tuner, model, CLASSES).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    trained = {key: value for key, value in network.named_parameters() if value.requires_grad}
    reached: set[str] = set()
    pictures = images(tuner, network, model)
    for step in range(2 if tuner.trains else 0):  # LoRA's first matrix gets none before its second has moved
        logits = network(pictures)
        assert logits.shape[1] == CLASSES
        target = torch.randint(CLASSES, (len(logits), *logits.shape[2:]), generator=torch.Generator().manual_seed(step))
        network.zero_grad(set_to_none=True)
        ce_dice(logits, target).backward()  # type: ignore[no-untyped-call]
        reached |= {key for key, value in trained.items() if value.grad is not None and bool(value.grad.any())}
        with torch.no_grad():
            for value in trained.values():
                if value.grad is not None:
                    value.sub_(value.grad, alpha=0.01)
    silent = SILENT[""] + SILENT.get(name, ()) + (PROMPTED if options.get("prompt") else ())
    assert not [key for key in trained.keys() - reached if not any(part in key for part in silent)]
    assert reached or not tuner.trains
    after = network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if key not in trained)


@pytest.mark.parametrize(
    "name", ["lora", "msa-adapter", "msa-adapter-3d", "samus", "sam-med2d-adapter", "sam3d-adapter"]
)
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(name: str) -> None:
    tuner, model = tuner_of(name), foundation("tiny")
    gradients, runs = [], []
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = tuner.build(model, 2)
        if recomputed:
            recompute_blocks(network.image_encoder)
        tuner.adapt(network)
        network.image_encoder.get_submodule("blocks.1").register_forward_pre_hook(lambda *_: runs.append(1))
        network(images(tuner, network, model)).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(runs) == 3  # once, and then once more for backward
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize(("name", "options"), FORMS, ids=words)
def test_half_precision_stays_close(name: str, options: dict[str, Any]) -> None:
    """Frozen weights halved too, as fine-tuning does it."""
    # cubes of 4 tokens: this torch computes wrong bf16 gradients of 3D convolutions where the first side is 2
    tuner, model = tuner_of(name, **options), foundation("tiny", 128 if name == "sam3d-adapter" else None)
    network = adapted(tuner, model, 3)
    pictures = images(tuner, network, model)
    full = network(pictures).detach()
    exported = {key.removeprefix("image_encoder.").rpartition(".")[0] for key in tuner.export(network)}
    halve_frozen(network.image_encoder, torch.bfloat16, keep=exported)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(pictures).float()
    assert float((half.detach() - full).abs().mean()) <= 0.1 * float(full.abs().mean())
    if tuner.trains:
        half.square().mean().backward()
        assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "options"), [form for form in FORMS if form[1]], ids=words)
def test_other_forms_keep_the_contract(name: str, options: dict[str, Any]) -> None:
    plugin = registry.load("tune", name)
    check_tuner(plugin, foundation("tiny"), plugin.Config(**options))


@pytest.mark.parametrize("name", registry.names("tune"))
def test_a_frozen_encoder_records_nothing_for_backward(name: str) -> None:
    tuner, model = tuner_of(name), foundation("tiny")
    network = adapted(tuner, model, 2)
    if tuner.takes == "volume" or any(p.requires_grad for p in network.image_encoder.parameters()):
        return
    assert not network.image_encoder(images(tuner, network, model)).requires_grad


@pytest.mark.parametrize("name", registry.names("tune"))
def test_an_encoder_nobody_knows_is_refused_or_never_opened(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, model = tuner_of(name), foundation("tiny")
    monkeypatch.setattr(type(model), "encoder", "resnet")
    reason = tuner.refuses(model)
    builds_on_it = name not in ("decoder-only", "encoder-decoder", "linear-probe", "none")
    assert (reason is not None) == builds_on_it
    assert reason is None or ("resnet" in reason and "tiny" in reason)


@pytest.mark.parametrize(
    ("name", "model_name", "side", "words"),
    [
        ("samus", "tiny", 48, "multiple of 32"),
        ("sam-med2d-adapter", "tiny", 80, "multiple of 32"),
        ("sam3d-adapter", "tiny", 32, "a cube of 1 tokens"),
        ("sam3d-adapter", "tiny", 320, "a cube of 10 tokens"),
        ("msa-adapter", "sam-med2d", 256, "adapters=false"),
        ("samus", "sam-med2d", 256, "adapters=false"),
        ("msa-adapter-3d", "lite-medsam", 256, "tiny-vit"),
        ("samus", "lite-medsam", 256, "tiny-vit"),
        ("sam3d-adapter", "mobile-sam", 1024, "tiny-vit"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(name: str, model_name: str, side: int, words: str) -> None:
    plugin = registry.load("model", model_name)
    reason = tuner_of(name).refuses(plugin(plugin.Config(input_size=side)))
    assert reason is not None
    assert words in reason
