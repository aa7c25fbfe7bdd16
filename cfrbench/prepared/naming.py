"""What file names say: which is an image and which a label, which belong together, whose scan it is."""

from __future__ import annotations

import re
from pathlib import Path

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "scans", "volumes")
LABEL_FOLDERS = ("labels", "label", "masks", "mask", "segmentations", "segmentation", "segs", "seg", "annotations",
                 "gt", "ground_truth")  # fmt: skip
ROLES = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test", "testing": "test"}

_LABEL_WORD = r"(?:labels?|labelmap|dseg|seg|segmentation|mask|gt|roi|annotation)"
_IMAGE_WORD = r"(?:images?|img|scan|volume|vol)"
_LABEL_END = re.compile(rf"(?:^|[_\-. ]){_LABEL_WORD}$", re.IGNORECASE)
_WORDS = re.compile(rf"(?:^|(?<=[_\-. ]))(?:{_LABEL_WORD}|{_IMAGE_WORD})(?=[_\-. \d]|$)", re.IGNORECASE)
_CHANNEL = re.compile(r"_(\d{4})$")
#: what follows the patient in the names of several scans of one: time points, phases, visits
_VISIT = re.compile(
    r"(?:[_\- ](?:(?:frame|time|visit|ses|session|scan|phase|run|day|week|month)[-_]?\d+|(?:tp|t|v)\d+"
    r"|baseline|followup|ed|es))+$",
    re.IGNORECASE,
)
#: entities of BIDS that tell scans apart; the others (space, desc, label ...) say how a derivative was made
_ENTITIES = ("sub", "ses", "run", "acq", "echo", "chunk")


def is_label(path: Path, stem: str) -> bool:
    """Whether a file's name or one of its folders says that it is a label map."""
    return bool(_LABEL_END.search(stem)) or any(part.lower() in LABEL_FOLDERS for part in path.parent.parts)


def key_of(stem: str) -> str:
    """A stem without the words that only say whether it is an image or a label: ``img0001`` -> ``0001``."""
    return re.sub(r"[_\-. ]{2,}", "_", _WORDS.sub("", stem)).strip("_-. ")


def channel_of(stem: str) -> tuple[str, int | None]:
    """``case_0001`` -> (``case``, 1), the channel as nnU-Net writes it; (stem, None) without one."""
    hit = _CHANNEL.search(stem)
    return (stem[: hit.start()], int(hit[1])) if hit else (stem, None)


def bids_key(stem: str) -> tuple[str, str] | None:
    """(scan, suffix) of a BIDS name: ``sub-01_ses-2_T1w`` -> (``sub-01_ses-2``, ``T1w``); None for other names."""
    if not re.match(r"sub-[A-Za-z0-9]+(_|$)", stem):
        return None
    parts = stem.split("_")
    kept = [part for part in parts if part.partition("-")[0] in _ENTITIES and "-" in part]
    return "_".join(kept), parts[-1] if "-" not in parts[-1] else ""


def prefixes(stem: str) -> list[tuple[str, str]]:
    """A stem and what is left of it when words are cut off its end, each with the rest: longest first."""
    cuts = [hit.start() for hit in re.finditer(r"[_\-. ]", stem)]
    return [(stem, ""), *((stem[:cut], stem[cut + 1 :]) for cut in reversed(cuts) if cut)]


def patient_of(case: str, pattern: str | None = None) -> str:
    """The patient in a case id: group 1 of ``pattern``, else the id without time points, frames and visits."""
    if pattern is not None:
        hit = re.search(pattern, case)
        return (hit.group(1) if hit.re.groups else hit.group()) if hit else case
    bids = re.match(r"sub-[A-Za-z0-9]+", case)
    return bids.group() if bids else _VISIT.sub("", case) or case


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A sorting key in which ``case10`` follows ``case9``."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.findall(r"\d+|\D+", text))
