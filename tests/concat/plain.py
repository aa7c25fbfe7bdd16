"""A plain reading of the original concatenation: loops over tiles, pictures written one by one.

Facts: ShumengLI/CFR code/utils/util.py; each axis by itself.
"""

from __future__ import annotations

from torch import Tensor

from cfrbench.config import Triple


def plain_axis(side: int, canvas: int) -> tuple[int, int, int, int]:
    """Tiles, padding, tile size and margin along one axis."""
    tiles = canvas // side
    pad = round((canvas / tiles - side) / 2)
    tile = side + 2 * pad
    return tiles, pad, tile, (canvas - tiles * tile) // 2


def plain_forward(volume: Tensor, canvas: int, fill: float) -> Tensor:
    """One volume (H, W, D) tile by tile; a canvas that is too small is enlarged and cut at the end."""
    height, width, depth = volume.shape
    n_rows, pad_rows, tile_rows, top = plain_axis(width, canvas)
    n_cols, pad_cols, tile_cols, left = plain_axis(height, canvas)
    grow_rows, grow_cols = max(0, -top), max(0, -left)
    image = volume.new_full((canvas + 2 * grow_rows, canvas + 2 * grow_cols), fill)
    blank = max((n_rows * n_cols - depth) // 2, 0)
    for k in range(depth):
        row, col = divmod(k + blank, n_cols)
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
