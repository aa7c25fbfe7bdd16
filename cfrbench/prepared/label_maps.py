"""Raw label values to class numbers: stated by a person or a file, or taken from values that leave no doubt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfrbench.config import Frozen
from cfrbench.errors import DataError

#: the value that marks padding (`cfrbench.volume.IGNORE`, whose module brings torch): no class can have it
IGNORE = 255
#: how far a stored number may lie from a whole one: maps saved with scaling come back as 0.9999
_TOLERANCE = 1e-3
#: raw values below this are looked up in a table
_TABLE = 2**16


class LabelMap(Frozen):
    """Raw value -> class number, and the name of each class, background first. Values not named are ``other``."""

    names: tuple[str, ...]
    values: dict[int, int]
    other: int | None = None  # None: a value that is not named is an error

    def stated(self) -> str:
        """The map in words: ``1 -> spleen, 3 -> left kidney, others -> background``."""
        parts = [f"{raw} -> {self.names[number]}" for raw, number in self.values.items() if number or raw]
        return ", ".join(parts + ([f"others -> {self.names[self.other]}"] if self.other is not None else []))

    def apply(self, raw: NDArray[Any]) -> NDArray[np.uint8]:
        """Class numbers of raw values of any numeric type; DataError if one has no class."""
        whole = whole_numbers(raw)
        table = np.full(_TABLE, IGNORE if self.other is None else self.other, np.uint8)
        for value, number in self.values.items():
            table[value] = number
        mapped: NDArray[np.uint8] = table[whole]
        if self.other is None and (mapped == IGNORE).any():
            odd = np.unique(whole[mapped == IGNORE])
            raise DataError(f"the label holds {_listed(odd)}, which the map ({self.stated()}) does not name. Name it, "
                            "or correct the file.")  # fmt: skip
        return mapped


def whole_numbers(raw: NDArray[Any]) -> NDArray[Any]:
    """Raw label values as integers from 0 to 65535; DataError if they are no such numbers."""
    if raw.dtype.kind == "b":
        return raw.astype(np.uint8)
    whole = raw
    if raw.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = np.round(raw)
            fits = bool((np.abs(raw - whole) <= _TOLERANCE).all())  # NaN fails this, as it must
        if not fits:
            raise DataError("the label holds values that are not whole numbers. Is it a probability map, or an image? "
                            "Store one class number a voxel.")  # fmt: skip
    low, high = whole.min(), whole.max()
    if low < 0 or high >= _TABLE:
        raise DataError(f"the label holds values from {low:g} to {high:g}; class numbers are 0 to {_TABLE - 1}. Is it "
                        "the image, saved under the label's name?")  # fmt: skip
    return whole.astype(np.uint16)


def counted(raw: NDArray[Any]) -> dict[int, int]:
    """How many voxels have each raw value."""
    counts = np.bincount(whole_numbers(raw).ravel())
    present = np.flatnonzero(counts)
    return dict(zip(present.tolist(), counts[present].tolist(), strict=True))


def parse(text: str) -> LabelMap:
    """``"1=spleen,2+3=kidneys,5"`` -> three classes in this order; every other value is background."""
    names, values = ["background"], {0: 0}
    for part in filter(None, (p.strip() for p in text.split(","))):
        raw, sign, name = (p.strip() for p in part.partition("="))
        numbers = [p.strip() for p in raw.split("+")]
        if not all(re.fullmatch(r"\d+", n) and 0 < int(n) < _TABLE for n in numbers) or (sign and not name):
            raise DataError(f"'{part}' is no entry of a label map. Write VALUE=NAME or VALUE+VALUE=NAME, separated by "
                            "commas, for example 1=spleen,2+3=kidneys.")  # fmt: skip
        twice = [n for n in numbers if int(n) in values]
        if twice:
            raise DataError(f"The label map names the value {twice[0]} twice. Give each value one class.")
        values.update(dict.fromkeys(map(int, numbers), len(names)))
        names.append(name or f"class {raw}")
    return _checked(LabelMap(names=tuple(names), values=values, other=0))


def of_names(stated: Mapping[int, str]) -> LabelMap:
    """The map that a file states: values in rising order are classes 0, 1, ...; 0 must be the background."""
    order = sorted(stated)
    if not order or order[0] != 0:
        raise DataError("The names of the classes do not include 0, the background. Add it, or give --labels-map.")
    values = {value: number for number, value in enumerate(order)}
    return _checked(LabelMap(names=tuple(stated[value] for value in order), values=values))


def inferred(found: Iterable[int]) -> LabelMap:
    """The map of values that need none: 0, 1, ..., n, or 0 and a single other. DataError proposes one for the rest."""
    values = sorted(set(found) | {0})
    foreground = values[1:]
    if not foreground:
        raise DataError("No label holds anything but 0, so there is nothing to learn. Check that these are the labels.")
    if len(foreground) > 1 and foreground != list(range(1, len(values))):
        proposal = ",".join(f"{v}=class-{v}" for v in foreground)
        raise DataError(f"The labels hold {_listed(values)}, which are not numbered 0 to {len(values) - 1}. Say what "
                        "they mean, in the order wanted, leaving out what is background: --labels-map "
                        f"{proposal}")  # fmt: skip
    names = (
        ("background", "foreground") if len(foreground) == 1 else ("background", *(f"class {v}" for v in foreground))
    )
    return _checked(LabelMap(names=names, values={value: number for number, value in enumerate(values)}))


def _checked(found: LabelMap) -> LabelMap:
    if not 2 <= len(found.names) <= IGNORE:
        raise DataError(f"{len(found.names)} classes do not fit: there must be 2 to {IGNORE} with background. Name "
                        "the ones that are wanted with --labels-map.")  # fmt: skip
    twice = sorted({name for name in found.names if found.names.count(name) > 1})
    if twice:
        raise DataError(f"Two classes are called '{twice[0]}'. Join their values with '+', or name them apart.")
    return found


def _listed(values: Sequence[int] | NDArray[Any]) -> str:
    few = [str(int(v)) for v in values[:12]]
    return f"the value{'s' * (len(values) != 1)} {', '.join(few)}{' ...' * (len(values) > 12)}"
