"""The laws of a data source, and a look at pseudo-labels."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from cfrbench.config import PRESETS, Frozen, Settings, override
from cfrbench.contracts import DataSource
from cfrbench.errors import ConfigError, DataError
from cfrbench.testing._lab import require
from cfrbench.volume import Split


def check_data(source: DataSource) -> None:
    """Raise AssertionError, in a sentence, at the first law of `DataSource` that ``source`` breaks.

    Reads one case of each role; `cfrbench.datasets.check_source` reads all of them. DataError of a folder that is not
    there passes through.
    """
    name = type(source).__qualname__
    for field in ("name", "title", "modality", "licence", "origin"):
        require(bool(getattr(source, field, "")), f"{name} has no `{field}`.")
    require(issubclass(type(source).Config, Frozen), f"{name}.Config is not derived from cfrbench.config.Frozen.")
    names = source.class_names
    distinct = len(names) >= 2 and len(set(names)) == len(names)
    require(distinct, f"{name} needs two or more classes, named apart, and has {names}.")
    split = source.split()
    over = {words: budget for words, budget in source.budgets.items() if not 1 <= budget <= len(split.train)}
    require(not over, f"Budgets of {name} are no number of its {len(split.train)} training cases: {over}.")
    _check_fingerprint(name, source, split)
    for case in (split.train[0], split.test[0], *split.val[:1]):
        _check_case(name, source, case)
    unlabelled = [case for case in (split.test[0], *split.val[:1]) if source.load(case).label is None]
    require(not unlabelled, f"{name} has no label of {unlabelled}, so nothing can be scored.")
    _check_unknown(name, source)
    _check_protocol(name, source)


def _check_fingerprint(name: str, source: DataSource, split: Split) -> None:
    fingerprint = dict(source.fingerprint())
    cases = {*split.train, *split.val, *split.test}
    odd = sorted(cases ^ fingerprint.keys())
    require(not odd, f"The fingerprint of {name} and its lists differ in {odd[:3]}.")
    wrong = sorted(case for case, text in fingerprint.items() if not re.fullmatch("[0-9a-f]{64}", text))
    require(not wrong, f"The fingerprint of {name} is no SHA-256 for {wrong[:3]}.")
    require(len(set(fingerprint.values())) == len(fingerprint), f"{name} holds one volume under several names.")
    require(fingerprint == dict(source.fingerprint()), f"The fingerprint of {name} changes when asked again.")


def _check_case(name: str, source: DataSource, case: str) -> None:
    volume, again = source.load(case), source.load(case)
    require(volume.image.dtype == torch.float32, f"{name} loads {case} as {volume.image.dtype}, not float32.")
    require(torch.equal(volume.image, again.image), f"{name} loads another image of {case} the second time.")
    finite = bool(torch.isfinite(volume.image).all()) and volume.image.ndim == 3
    require(finite, f"{name} loads {case} unchecked: pass it through cfrbench.volume.checked_volume.")
    if volume.label is None:
        return
    same = again.label is not None and torch.equal(volume.label, again.label)
    require(same, f"{name} loads another label of {case} the second time.")
    fits = volume.label.dtype == torch.uint8 and volume.label.shape == volume.image.shape
    fits = fits and int(volume.label.max()) < source.num_classes
    require(fits, f"{name} loads a label of {case} unchecked: pass it through cfrbench.volume.checked_volume.")


def _check_unknown(name: str, source: DataSource) -> None:
    try:
        source.load("no-such-case")
    except DataError:
        return
    except Exception as error:
        raise AssertionError(
            f"{name} answers an unknown case with {type(error).__name__} instead of a DataError."
        ) from error
    raise AssertionError(f"{name} loads a case that it does not have.")


def _check_protocol(name: str, source: DataSource) -> None:
    for preset in PRESETS:
        try:
            override(Settings(), source.protocol(preset))
        except ConfigError as error:
            raise AssertionError(f"The protocol of {name} under the preset '{preset}' is refused: {error}") from error


def check_pseudo(labels: Mapping[str, Tensor]) -> None:
    """Raise AssertionError if all pseudo-labels, integer maps by case, are one constant class: they guide nowhere."""
    require(bool(labels), "There are no pseudo-labels.")
    classes = {int(value) for label in labels.values() for value in torch.unique(label).tolist()}
    require(len(classes) > 1, f"The pseudo-labels of all {len(labels)} cases are class {min(classes)} in every voxel: "
                              "fine-tuning taught nothing. Train it longer, or look at its input.")  # fmt: skip
