"""The formula volumes of `cfr_core`, and how its canvases are hashed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from cfrbench.config import Triple
from tests.golden.ledger import ledger

book = ledger("cfr_core")


def formula_image(shape: Triple) -> Tensor:
    """The image as integers, by the file's own coefficients."""
    a, b, c, modulus = (int(n) for n in book.take("formula/image"))
    x, y, z = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return (a * x + b * y + c * z + x * y // 3) % modulus


def formula_label(shape: Triple) -> Tensor:
    """The label as integers; larger volumes have larger patches of one class."""
    (modulus,) = (int(n) for n in book.take("formula/label"))
    x, y, z = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    coarse = min(shape[:2]) > 40
    return (x // 8 + y // 8 + z // 8 if coarse else x // 2 + y + 2 * z) % modulus


def shape_at(key: str) -> Triple:
    """A shape that the file holds."""
    height, width, depth = (int(n) for n in book.take(key))
    return height, width, depth


def sha256(values: Tensor) -> str:
    """SHA-256 of the values as uint8 in C order."""
    return hashlib.sha256(values.to(torch.uint8).contiguous().numpy().tobytes()).hexdigest()
