"""Signed distance maps of masks, exact: how far each voxel is from the surface, negative inside."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def signed_distance_maps(masks: Tensor, absent: float = 0.0) -> Tensor:
    """Return float32 maps in [-1, 1] of bool ``masks`` ``(..., H, W, D)``, negative inside, distances in voxels.

    Outside and inside are divided by their own largest distance, and mask voxels with a face neighbour outside are set
    to 0; the border of the array is no outside (HiLab-git/DTC code/utils/util.py, compute_sdf). An empty mask gives
    ``absent`` everywhere, officially 0. A mask that fills the array, where the official code divides 0 by 0, gives -1.
    """
    flat = masks.reshape(-1, *masks.shape[-3:])
    voxels = flat.flatten(1)
    some, every = voxels.any(dim=1), voxels.all(dim=1)
    # Chosen by multiplication, not by an if: a mask without a surface has no distances to divide.
    maps = torch.where(every, -1.0, absent).view(-1, 1, 1, 1).expand(flat.shape).contiguous()
    proper = torch.nonzero(some & ~every).flatten()
    if proper.numel():
        maps[proper] = _signed(flat[proper])
    return maps.view(masks.shape)


def _signed(masks: Tensor) -> Tensor:
    """The maps of masks ``(N, H, W, D)`` that have an inside and an outside."""
    outside, inside = distances(torch.cat([masks, ~masks])).chunk(2)
    signed = outside / outside.amax((1, 2, 3), keepdim=True) - inside / inside.amax((1, 2, 3), keepdim=True)
    return signed.masked_fill_(inside == 1.0, 0.0)  # at distance 1 from the outside: a face neighbour is there


def distances(targets: Tensor) -> Tensor:
    """Euclidean distance in voxels of each voxel to the nearest True one, float32; bool ``(N, H, W, D)``, none empty.

    On a CPU scipy does it crop by crop, on as many threads as torch uses; elsewhere `distances_by_offsets` saves the
    way to the CPU and back.
    """
    if targets.device.type != "cpu":
        return distances_by_offsets(targets)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        maps = list(pool.map(_to_nearest, targets.numpy()))
    return torch.from_numpy(np.stack(maps))


def _to_nearest(target: NDArray[np.bool_]) -> NDArray[np.float32]:
    from scipy import ndimage

    # The nearest True voxel of a False one lies in the box of all False ones, grown by one voxel: nothing is lost.
    false = ~target
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        reached = np.flatnonzero(false.any(axis=others))
        box.append(slice(max(int(reached[0]) - 1, 0), int(reached[-1]) + 2) if reached.size else slice(0))
    result = np.zeros(target.shape, dtype=np.float32)
    result[*box] = ndimage.distance_transform_edt(false[*box]) if false.any() else 0.0
    return result


def distances_by_offsets(targets: Tensor) -> Tensor:
    """`distances` on any device, by one pass over all offsets per axis: exact, because squares are whole numbers."""
    far = 2 * sum(side * side for side in targets.shape[1:])  # no true distance is that large
    squares = torch.where(targets, 0, far).to(torch.int32)
    for axis in range(1, 4):
        side = squares.shape[axis]
        nearest = squares.clone()
        for offset in range(1, side):
            shifted = squares + offset * offset
            for source, goal in ((0, offset), (offset, 0)):
                part = nearest.narrow(axis, goal, side - offset)
                torch.minimum(part, shifted.narrow(axis, source, side - offset), out=part)
        squares = nearest
    return squares.float().sqrt()
