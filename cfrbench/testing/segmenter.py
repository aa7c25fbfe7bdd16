"""The laws of a segmenter, on its smallest input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cfrbench.backbone import Backbone
from cfrbench.compute import seed_torch
from cfrbench.config import Frozen
from cfrbench.contracts import Segmenter
from cfrbench.errors import UsageError
from cfrbench.testing._lab import copy_of, differences, require

BATCH = 2
T = TypeVar("T")


def check_segmenter(segmenter_cls: type[Segmenter], config: Any = None) -> None:
    """Raise AssertionError, in a sentence, at the first law of `Segmenter` that ``segmenter_cls`` breaks."""
    segmenter = segmenter_cls(config)
    name = segmenter_cls.__qualname__
    require(bool(getattr(segmenter_cls, "name", "")), f"{name} has no `name`.")
    require(issubclass(segmenter_cls.Config, Frozen), f"{name}.Config is not derived from cfrbench.config.Frozen.")
    require(segmenter.divisor >= 1, f"The divisor of {name} is {segmenter.divisor}.")
    for channels, classes in ((1, 2), (2, 3)):
        network = _built(segmenter, channels, classes)
        changed = differences(copy_of(network), copy_of(_built(segmenter, channels, classes)))
        require(not changed, f"Two builds of {name} from one seed differ in {changed[:3]}: random numbers must come "
                             "from torch's global generator.")  # fmt: skip
        _check_forward(name, segmenter, network, channels, classes)
        if isinstance(network, Backbone):
            _check_parts(name, network, _built(segmenter, channels, classes), _input(segmenter, channels))
    _check_sides(name, segmenter)


def _built(segmenter: Segmenter, channels: int, classes: int) -> nn.Module:
    seed_torch(0, "check-init")
    return segmenter.build(channels, classes)


def _input(segmenter: Segmenter, channels: int) -> Tensor:
    side = max(segmenter.divisor, 4)
    shape = (BATCH, channels, 2 * side, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _check_forward(name: str, segmenter: Segmenter, network: nn.Module, channels: int, classes: int) -> None:
    image = _input(segmenter, channels)
    given = image.clone()
    logits = network.train()(image)
    shape = (BATCH, classes, *image.shape[2:])
    require(tuple(logits.shape) == shape, f"{name} returns {tuple(logits.shape)}, not {shape}.")
    require(torch.equal(given, image), f"{name} changes its input in place.")
    logits.square().mean().backward()
    dead = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    require(not dead, f"No gradient of the output of {name} reaches {dead[:3]}: unused layers only cost time.")
    with torch.no_grad():
        together, again, alone = network.eval()(image), network(image), network(image[1:])
    require(bool(torch.isfinite(together).all()), f"{name} returns logits that are not finite.")
    require(torch.equal(together, again), f"{name} is random in eval mode.")
    error = float((together[1:] - alone).abs().max())
    require(error <= 1e-3 * (1.0 + float(alone.abs().max())), f"{name} mixes the crops of a batch in eval mode: the "
            f"logits of one change by {error:.3g} with its neighbour.")  # fmt: skip


def _check_parts(name: str, network: Backbone, twin: nn.Module, image: Tensor) -> None:
    """A `Backbone` is what its parts give one after the other, and its decoder works without its encoder."""
    whole = _seeded(lambda: network.train()(image))
    features = _seeded(lambda: network.encode(image))
    given = [feature.clone() for feature in features]
    maps = network.decode(features)
    logits = network.out_conv(network.drop(maps[0]))
    require(torch.equal(whole, logits), f"The parts of {name}, called one after the other, do not give its output.")
    untouched = all(torch.equal(before, after) for before, after in zip(given, features, strict=True))
    require(untouched, f"The decoder of {name} changes the features it is given in place.")
    said = [(width, *(side >> level for side in image.shape[2:])) for level, width in enumerate(network.widths)]
    for part, found, expected in (("encoder", features, said), ("decoder", maps, said[:-1])):
        shapes = [tuple(level.shape[1:]) for level in found]
        require(shapes == expected, f"The {part} of {name} gives levels {shapes}; by its `widths` they are {expected}.")
    assert isinstance(twin, Backbone)
    twin.load_state_dict(network.state_dict())
    twin.remove_encoder()
    with torch.no_grad():
        alone, together = twin.eval().segment(features), network.eval().segment(features)
    require(torch.equal(alone, together), f"`remove_encoder` of {name} changes what its decoder gives.")
    total, kept = (sum(p.numel() for p in net.parameters()) for net in (network, twin))
    require(kept < total, f"`remove_encoder` of {name} removes nothing: unused layers only cost time.")


def _seeded(call: Callable[[], T]) -> T:
    seed_torch(0, "check-parts")
    return call()


def _check_sides(name: str, segmenter: Segmenter) -> None:
    """Sides that the network cannot take are refused in words."""
    if segmenter.divisor == 1:
        return
    side = segmenter.divisor
    try:
        _built(segmenter, 1, 2).eval()(torch.zeros(1, 1, side, side, side + 1))
    except UsageError as error:
        require(str(side) in str(error), f"{name} refuses a side of {side + 1} without naming the divisor {side}.")
        return
    except Exception as error:
        raise AssertionError(f"{name} fails on a side of {side + 1} with {type(error).__name__} instead of a "
                             "UsageError that says which sides fit.") from error  # fmt: skip
    raise AssertionError(f"{name} takes a side of {side + 1}, though its divisor is {side}.")
