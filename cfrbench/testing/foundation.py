"""The laws of foundation models and fine-tuners, on one small canvas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cfrbench.compute import seed_torch
from cfrbench.config import Frozen
from cfrbench.contracts import FineTuner, FoundationModel, Promptable
from cfrbench.errors import WeightsError
from cfrbench.losses import ce_dice
from cfrbench.testing._lab import copy_of, differences, require

CLASSES = 3


def check_model(model: FoundationModel) -> None:
    """Raise AssertionError, in a sentence, at the first law of `FoundationModel` that ``model`` breaks.

    Its weights must be there; WeightsError passes through if they are not.
    """
    name = type(model).__qualname__
    for field in ("name", "title", "licence", "origin"):
        require(bool(getattr(model, field, "")), f"{name} has no `{field}`.")
    require(issubclass(type(model).Config, Frozen), f"{name}.Config is not derived from cfrbench.config.Frozen.")
    identity = model.identity()
    require(bool(identity) and identity == model.identity(), f"The identity of {name} is empty or changes.")
    network, twin = _built(model), _built(model)
    changed = differences(copy_of(network), copy_of(twin))
    require(not changed, f"Two builds of {name} from one seed differ in {changed[:3]}: random numbers must come from "
                         "torch's global generator.")  # fmt: skip
    logits, again = _logits(network, model), _logits(network, model)
    side = logits.shape[-1]
    fits = tuple(logits.shape) == (1, CLASSES, side, side) and side <= model.input_size
    require(fits, f"{name} returns {tuple(logits.shape)} for one image, not one square mask for each of {CLASSES}.")
    require(bool(torch.isfinite(logits).all()), f"{name} returns logits that are not finite.")
    require(torch.equal(logits, again), f"{name} is random in eval mode.")
    _check_normalise(model, name)


def _check_normalise(model: FoundationModel, name: str) -> None:
    crops = torch.randn(2, 12, 10, 6, generator=torch.Generator().manual_seed(0))
    given = crops.clone()
    normalised = model.normalise(crops)
    require(torch.equal(given, crops), f"`normalise` of {name} changes its input.")
    require(normalised.shape == crops.shape, f"`normalise` of {name} returns {tuple(normalised.shape)}.")
    require(bool(torch.isfinite(normalised).all()), f"`normalise` of {name} returns values that are not finite.")
    alone = model.normalise(crops[1:])
    require(torch.equal(alone[0], normalised[1]), f"`normalise` of {name} mixes the crops of a batch.")


def check_tuner(tuner_cls: type[FineTuner], model: FoundationModel, config: Any = None) -> None:
    """Raise AssertionError, in a sentence, at the first law of `FineTuner` that ``tuner_cls`` breaks on ``model``.

    A tuner that refuses the model with a reason keeps the contract.
    """
    tuner = tuner_cls(config)
    name = tuner_cls.__qualname__
    require(issubclass(tuner_cls.Config, Frozen), f"{name}.Config is not derived from cfrbench.config.Frozen.")
    takes = ("canvas", "slices", "volume")
    require(tuner.takes in takes, f"{name} takes '{tuner.takes}', which is none of {takes}.")
    reason = tuner.refuses(model)
    if reason is not None:
        require(len(reason.split()) > 2, f"{name} refuses {model.title} without a reason: '{reason}'.")
        return
    network = _built(model, tuner=tuner)
    parameters = tuner.adapt(network)
    _check_frozen(tuner, network, parameters)
    if tuner.trains:
        _check_training(name, model, network, parameters)
    exported = tuner.export(network)
    _check_restore(name, tuner, model, network, exported)
    _check_misfits(name, tuner, network, exported)
    _check_merge(name, tuner, model, network)


def _check_frozen(tuner: FineTuner, network: Promptable, parameters: list[nn.Parameter]) -> None:
    name = type(tuner).__qualname__
    flagged = {id(p): n for n, p in network.named_parameters() if p.requires_grad}
    given = {id(parameter) for parameter in parameters}
    wrong = "nothing to train" if tuner.trains else "parameters to train, though `trains` is False"
    require(bool(given) == tuner.trains, f"{name} returns {wrong}.")
    require(len(given) == len(parameters), f"{name} returns a parameter twice.")
    require(given <= flagged.keys(), f"{name} returns parameters that are frozen or not part of the model.")
    left = [flagged[key] for key in flagged.keys() - given]
    require(not left, f"{name} leaves {sorted(left)[:3]} trainable without returning them.")


def _check_training(name: str, model: FoundationModel, network: Promptable, parameters: list[nn.Parameter]) -> None:
    """Two steps move something, and nothing that is frozen."""
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    before = copy_of(network)
    optimiser = torch.optim.SGD(parameters, lr=0.1, foreach=False)
    network.train()
    for step in range(2):
        logits = network(_image(network.input_size or model.input_size, step))
        target = torch.randint(CLASSES, logits.shape[:1] + logits.shape[2:], generator=_generator(step))
        optimiser.zero_grad(set_to_none=True)
        ce_dice(logits, target).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    moved = set(differences(before, copy_of(network)))
    require(bool(moved), f"Training what {name} returned changes nothing.")
    frozen = sorted((moved - trained) & {n for n, _ in network.named_parameters()})
    require(not frozen, f"Training with {name} changes {frozen[:3]}, which is frozen.")


def _check_restore(
    name: str, tuner: FineTuner, model: FoundationModel, network: Promptable, exported: dict[str, Tensor]
) -> None:
    """The export is a copy, and enough: another build becomes bit-equal by it."""
    kept = {key: tensor.clone() for key, tensor in exported.items()}
    other = _built(model, seed=1, tuner=tuner)
    tuner.adapt(other)
    tuner.restore(other, exported)
    changed = differences(copy_of(network), copy_of(other))
    require(not changed, f"A model restored from the export of {name} differs from the trained one in {changed[:3]}.")
    same = torch.equal(_logits(network, model), _logits(other, model))
    require(same, f"A model restored by {name} predicts otherwise than the trained one.")
    with torch.no_grad():
        for parameter in [p for p in other.parameters() if p.requires_grad]:
            parameter.add_(1.0)
    require(not differences(kept, exported), f"The export of {name} shares memory with a model it was restored into.")


def _check_misfits(name: str, tuner: FineTuner, network: Promptable, exported: dict[str, Tensor]) -> None:
    """What does not fit is a WeightsError."""
    first = min(exported)
    shapeless = exported[first].new_zeros((*exported[first].shape, 2))
    missing = {key: tensor for key, tensor in exported.items() if key != first}
    for words, tensors in (("a missing tensor", missing), ("a wrong shape", {**exported, first: shapeless})):
        try:
            tuner.restore(network, tensors)
        except WeightsError:
            continue
        raise AssertionError(f"`restore` of {name} accepts {words} ('{first}') instead of raising WeightsError.")


def _check_merge(name: str, tuner: FineTuner, model: FoundationModel, network: Promptable) -> None:
    before = _logits(network, model)
    tuner.merge(network)
    error = float((_logits(network, model) - before).abs().max())
    limit = 1e-3 * float(before.abs().max()) + 1e-5
    require(error <= limit, f"`merge` of {name} changes the logits by {error:.3g}; rounding would be {limit:.2g}.")


def _built(model: FoundationModel, seed: int = 0, tuner: FineTuner | None = None) -> Promptable:
    seed_torch(seed, "check-init")
    return model.build(CLASSES) if tuner is None else tuner.build(model, CLASSES)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _image(side: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, side, side, generator=_generator(seed))


@torch.no_grad()
def _logits(network: Promptable, model: FoundationModel) -> Tensor:
    logits: Tensor = network.eval()(_image(network.input_size or model.input_size))
    return logits
