"""A plain reading of the concatenation: loops over tiles, pictures written one by one.

Facts: ShumengLI/CFR code/utils/util.py; each axis by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cfrbench.config import Triple


def plain_axis(side: int, canvas: int) -> tuple[int, int, int, int]:
    """Tiles, padding, tile size and margin along one axis."""
    tiles = canvas // side
    pad = round((canvas / tiles - side) / 2)
    tile = side + 2 * pad
    return tiles, pad, tile, (canvas - tiles * tile) // 2


def plain_forward(volume: Tensor, canvas: int, fill: float, path: Sequence[int] = ()) -> Tensor:
    """One volume (H, W, D) tile by tile; a canvas that is too small is enlarged and cut at the end.

    path: the tiles in the order in which they are filled, row by row if empty.
    """
    height, width, depth = volume.shape
    n_rows, pad_rows, tile_rows, top = plain_axis(width, canvas)
    n_cols, pad_cols, tile_cols, left = plain_axis(height, canvas)
    grow_rows, grow_cols = max(0, -top), max(0, -left)
    image = volume.new_full((canvas + 2 * grow_rows, canvas + 2 * grow_cols), fill)
    blank = max((n_rows * n_cols - depth) // 2, 0)
    for k in range(depth):
        number = k + blank
        row, col = divmod(path[number] if path and number < len(path) else number, n_cols)
        if row < n_rows:
            y, x = max(top, 0) + row * tile_rows + pad_rows, max(left, 0) + col * tile_cols + pad_cols
            image[y : y + width, x : x + height] = volume[:, :, k].T
    return image[grow_rows : grow_rows + canvas, grow_cols : grow_cols + canvas]


def plain_inverse(image: Tensor, shape: Triple) -> Tensor:
    """Back to (H, W, D) tile by tile: 255 in rims that were cut, 0 in slices that were not placed."""
    height, width, depth = shape
    n_rows, pad_rows, tile_rows, top = plain_axis(width, image.shape[0])
    n_cols, pad_cols, tile_cols, left = plain_axis(height, image.shape[1])
    grow_rows, grow_cols = max(0, -top), max(0, -left)
    padded = image.new_full((image.shape[0] + 2 * grow_rows, image.shape[1] + 2 * grow_cols), 255)
    padded[grow_rows : grow_rows + image.shape[0], grow_cols : grow_cols + image.shape[1]] = image
    blank = max((n_rows * n_cols - depth) // 2, 0)
    volume = image.new_zeros(shape)
    for k in range(depth):
        row, col = divmod(k + blank, n_cols)
        if row < n_rows:
            y, x = max(top, 0) + row * tile_rows + pad_rows, max(left, 0) + col * tile_cols + pad_cols
            volume[:, :, k] = padded[y : y + width, x : x + height].T
    return volume


def what_is_lost(shape: Triple, canvas: int, path: Sequence[int] = ()) -> str:
    """Why the official geometry cannot hold ``shape``: the words a refusal must have; empty if it holds it."""
    height, width, depth = shape
    if max(height, width) > canvas:
        return "not a single tile fits"
    places = (canvas // width) * (canvas // height)
    if places < depth:
        return f"tiles hold {places} of {depth} slices"
    n_rows, pad_rows, tile_rows, top = plain_axis(width, canvas)
    n_cols, pad_cols, tile_cols, left = plain_axis(height, canvas)
    first = (n_rows * n_cols - depth) // 2
    for tile in (path or range(places))[first : first + depth]:
        y, x = top + tile // n_cols * tile_rows + pad_rows, left + tile % n_cols * tile_cols + pad_cols
        if min(x, y) < 0 or y + width > canvas or x + height > canvas:
            return "voxels off the rims"
    return ""


def plain_winding(n_rows: int, n_cols: int) -> list[int]:
    """Tile numbers, every second row from right to left."""
    return [row * n_cols + (n_cols - 1 - step if row % 2 else step) for row in range(n_rows) for step in range(n_cols)]


def plain_spiral(n_rows: int, n_cols: int) -> list[int]:
    """Tile numbers, walking right and turning right wherever the next tile is taken or absent."""
    row, col, down, right = 0, 0, 0, 1
    path: list[int] = []
    for _ in range(n_rows * n_cols):
        path.append(row * n_cols + col)
        free = 0 <= row + down < n_rows and 0 <= col + right < n_cols
        if not free or (row + down) * n_cols + col + right in path:
            down, right = right, -down
        row, col = row + down, col + right
    return path


def plain_weights(old: int, new: int) -> Tensor:
    """``(new, old)``: how much of each old pixel is in each new one, by a triangle as wide as the coarser pixels."""
    step = old / new
    rows = [[max(0.0, 1 - abs((j + 0.5 - (i + 0.5) * step) / max(step, 1.0))) for j in range(old)] for i in range(new)]
    weights = torch.tensor(rows)
    return weights / weights.sum(1, keepdim=True)


def plain_scaled(volume: Tensor, canvas: int, fill: float, n: int, start: int, rim: int) -> Tensor:
    """n x n slices from ``start``, one by one enlarged to their tile (or shrunk) in proportion, centred in its cell."""
    cell, longest = canvas // n, max(volume.shape[:2])
    side = cell - 2 * rim
    side = max(side, longest) if longest <= cell else side
    height, width = (max(1, round(length * side / longest)) for length in volume.shape[:2])
    tile_rows, tile_cols = width + (cell - width) // 2 * 2, height + (cell - height) // 2 * 2
    image = volume.new_full((canvas, canvas), fill)
    for t in range(min(n * n, volume.shape[2] - start)):
        piece = volume[:, :, start + t].T
        if (height, width) != tuple(volume.shape[:2]):
            piece = plain_weights(volume.shape[1], width) @ piece @ plain_weights(volume.shape[0], height).T
        y = (canvas - n * tile_rows) // 2 + t // n * tile_rows + (cell - width) // 2
        x = (canvas - n * tile_cols) // 2 + t % n * tile_cols + (cell - height) // 2
        image[y : y + width, x : x + height] = piece
    return image


def plain_turned(volume: Tensor, turns: Sequence[tuple[int, int]], fill: float) -> Tensor:
    """Slices as squares (m, m, D), each turned by k quarters and flipped as it stands on the canvas: transposed."""
    height, width, depth = volume.shape
    side = max(height, width)
    square = volume.new_full((side, side, depth), fill)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = volume
    for k, (quarters, axis) in enumerate(turns):
        square[:, :, k] = torch.rot90(square[:, :, k].T.clone(), quarters).flip(axis).T
    return square
