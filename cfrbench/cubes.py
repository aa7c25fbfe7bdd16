"""Crops as grids of cubes: cut up, exchanged between crops, put back; and what MagicNet learns from them.

Crops are ``(B, K, H, W, D)`` with any number of channels K, a grid is ``(nx, ny, nz)``, N its number of cubes, cubes
are ``(B, N, K, h, w, d)`` with the last axis of the grid fastest. Source: DeepMed-Lab-ECNU/MagicNet
code/utils/cube_utils.py, code/utils/cube_losses.py and code/train_main_btcv.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cfrbench.config import Triple
from cfrbench.errors import ConfigError
from cfrbench.losses import class_map

#: cubes per axis of the original, 96 / 32
USUAL = 3


def choose_grid(crop: Triple, divisor: int, cubes: Triple | None = None) -> Triple:
    """Return ``cubes``, or else how many cubes an axis of the crop is cut into: 3 wherever that is possible.

    The side of a cube must be a multiple of ``divisor``, for a network sees it alone. Of the numbers that allow this,
    the one nearest to 3 is taken, the smaller of two, but 1 only if there is no other. ConfigError, with sides that
    fit, if a side cannot be cut so or all of them stay whole.
    """
    asked: tuple[int | None, ...] = (None, None, None) if cubes is None else cubes
    grid = [_count(side, divisor, number) for side, number in zip(crop, asked, strict=True)]
    if 0 not in grid and math.prod(grid) > 1:
        nx, ny, nz = grid
        return nx, ny, nz
    units = [divisor * (2 if number is None else number) for number in asked]
    fitting = (-(-side // unit) * unit for side, unit in zip(crop, units, strict=True))
    wanted = "several cubes" if cubes is None else f"{_sides(cubes)} cubes"
    raise ConfigError(
        f"A crop of {_sides(crop)} voxels cannot be cut into {wanted} whose sides are multiples of {divisor}, as the "
        f"segmenter needs them. Set training.patch to {_sides(fitting)}, or choose a segmenter that halves less often."
    )


def _count(side: int, divisor: int, asked: int | None) -> int:
    """How many cubes; 0 if that is impossible."""
    units, rest = divmod(side, divisor)
    possible = [] if rest else [number for number in range(1, units + 1) if units % number == 0]
    if asked is not None:
        return asked if asked in possible else 0
    return min(possible, key=lambda number: (number == 1, abs(number - USUAL), number), default=0)


def _sides(sides: Iterable[int]) -> str:
    return "x".join(map(str, sides))


# ---------------------------------------------------------------------------------------------------------------------
# moving cubes


def cut(crops: Tensor, grid: Triple) -> Tensor:
    """The cubes ``(B, N, K, h, w, d)`` of ``(B, K, H, W, D)``; each side must be a multiple of the grid's."""
    (nx, ny, nz), (height, width, depth) = grid, crops.shape[2:]
    split = crops.reshape(*crops.shape[:2], nx, height // nx, ny, width // ny, nz, depth // nz)
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3)


def join(cubes: Tensor, grid: Triple) -> Tensor:
    """The crops whose `cut` is ``cubes``."""
    split = torch.unflatten(cubes, 1, grid).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return split.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def join_transposed(cubes: Tensor, grid: Triple) -> Tensor:
    """The original's `join`: it reads the list as if the first axis were fastest, so most cubes change places.

    On a cubic grid the first and the last axis are exchanged: of 27 cubes 9 stay. What is in a cube stays as it is.
    """
    return join(cubes[:, location_labels(grid, cubes.device)], grid)


def draw_exchange(crops: int, grid: Triple, device: torch.device | None = None) -> Tensor:
    """A random permutation of the crops for each place of the grid, ``(crops, nx, ny, nz)``."""
    return torch.rand(crops, *grid, device=device).argsort(dim=0)


def exchange(crops: Tensor, source: Tensor) -> Tensor:
    """Give crop b at place q the cube that crop ``source[b, q]`` has there: cubes change crops, never their place."""
    _, nx, ny, nz = source.shape
    cubes = cut(crops, (nx, ny, nz))
    number = cubes.shape[1]
    flat = source.flatten(1) * number + torch.arange(number, device=source.device)
    # Not by an index per axis: its backward pass would add voxel by voxel.
    chosen = cubes.flatten(0, 1).index_select(0, flat.flatten())
    return join(torch.unflatten(chosen, 0, cubes.shape[:2]), (nx, ny, nz))


def recover(crops: Tensor, source: Tensor) -> Tensor:
    """Undo `exchange` by the same ``source``."""
    return exchange(crops, source.argsort(dim=0))


# ---------------------------------------------------------------------------------------------------------------------
# learning from cubes


def location_labels(grid: Triple, device: torch.device | None = None) -> Tensor:
    """The class ``x + nx y + nx ny z`` of each cube's place ``(x, y, z)``, ``(N,)``, in the order of `cut`."""
    nx, ny, nz = grid
    return torch.arange(nx * ny * nz, device=device).reshape(nz, ny, nx).permute(2, 1, 0).flatten()


def location_loss(head: Callable[[Tensor], Tensor], features: Sequence[Tensor], grid: Triple) -> Tensor:
    """Mean cross-entropy of telling each cube's place from its features, ``(N, ...)`` for every crop.

    The ``head`` maps ``(N, flattened features)`` to scores ``(N, N)`` and sees one crop at a time, as its batch norm
    does officially. There the cubes come in random order, which does not change the value.
    """
    places = location_labels(grid, features[0].device)
    losses = [F.cross_entropy(head(cubes.flatten(1)).float(), places) for cubes in features]
    return torch.stack(losses).mean()


def class_weights(counts: Tensor, temperature: float = 1.0) -> Tensor:
    """How far each class may come from the cubes: ``(count / largest count)^(1 / temperature)``, ``(C,)`` float32."""
    share = counts.double() / counts.max().clamp(min=1)
    return share.pow(1.0 / temperature).float()


def blend(teacher_logits: Tensor, cube_logits: Tensor, weights: Tensor) -> Tensor:
    """``(1 - W) teacher + W cubes``, both ``(B, C, ...)``, W the weight ``(C,)`` of the class the teacher sees there.

    The most frequent class has weight 1 and comes from the cubes alone, while rare organs stay the teacher's.
    """
    teacher = teacher_logits.float()
    weight = weights[class_map(teacher).long()].unsqueeze(1)
    return (1.0 - weight) * teacher + weight * cube_logits.float()


def class_histogram(labels: Tensor, classes: int) -> Tensor:
    """How many voxels of ``labels`` (any shape) each class has, ``(classes,)`` int64; other labels are not counted."""
    return torch.stack([(labels == index).sum() for index in range(classes)])
