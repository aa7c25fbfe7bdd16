"""Finds images and their labels in a folder: nnU-Net's layout, MSD's, two folders, names that match, or a CSV."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cfrbench.errors import DataError
from cfrbench.prepared.form import checked_case
from cfrbench.prepared.listing import Listing, inside, list_folder, refuse_without_images
from cfrbench.prepared.naming import (
    IMAGE_FOLDERS,
    LABEL_FOLDERS,
    ROLES,
    bids_key,
    channel_of,
    is_label,
    key_of,
    natural,
    patient_of,
    prefixes,
)
from cfrbench.prepared.nifti import case_stem


@dataclass(frozen=True)
class Pair:
    """One case: its image, its label if it has one, whose it is; role is ``train``, ``val``, ``test`` or "" (free)."""

    case: str
    image: Path
    label: Path | None
    patient: str = ""
    role: str = ""
    stratum: str = ""


@dataclass(frozen=True)
class Search:
    """How to look: ``channel`` of nnU-Net's files or of 4D images, ``contrast`` ending of several images of a case."""

    channel: int | None = None
    contrast: str | None = None
    patient_pattern: str | None = None
    follow_links: bool = False


@dataclass(frozen=True)
class Found:
    """The cases of a folder in natural order. class_names: raw value -> name, where a file states them."""

    layout: str
    pairs: tuple[Pair, ...]
    class_names: Mapping[int, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def find_pairs(source: Path, search: Search = Search()) -> Found:
    """Find the cases of a folder, or those that a ``.csv`` lists. DataError says what was looked for."""
    if source.suffix.lower() == ".csv" and source.is_file():
        return _finished(_from_csv(source, search), search)
    listing = list_folder(source, search.follow_links)
    facts = _dataset_json(source)
    if _is_msd(facts):
        return _finished(_from_msd(source, facts, search), search)
    if source / "manifest.csv" in (source / path for path in listing.files if path.parent == Path()):
        return _finished(_from_csv(source / "manifest.csv", search), search)
    refuse_without_images(listing)
    found = _from_folders(listing, search) or _from_names(listing, search)
    return _finished(replace(found, class_names=_class_names(facts), facts=_said(facts)), search)


def _finished(found: Found, search: Search) -> Found:
    """Ids checked and unique, patients named, cases in natural order."""
    by_case: dict[str, Pair] = {}
    for pair in found.pairs:
        if checked_case(pair.case) in by_case:
            raise DataError(f"{pair.image} and {by_case[pair.case].image} are both the case '{pair.case}'. Rename or "
                            "remove one of them.")  # fmt: skip
        patient = pair.patient or patient_of(pair.case, search.patient_pattern)
        by_case[pair.case] = replace(pair, patient=patient)
    if not any(pair.label for pair in by_case.values()):
        raise DataError(f"{len(by_case)} images were found ({found.layout}), but no label. Put labels in a folder "
                        "`labels` under the images' names, or list both in a .csv with columns image and "
                        "label.")  # fmt: skip
    order = sorted(by_case, key=natural)
    return replace(found, pairs=tuple(by_case[case] for case in order))


# ---------------------------------------------------------------------------------------------------------------------
# lists of files


def _from_csv(path: Path, search: Search) -> Found:
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = list(csv.DictReader(text.splitlines(), dialect=csv.Sniffer().sniff(text.split("\n")[0], ",;\t")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table: {error}. Give a UTF-8 .csv with a header line.") from error
    rows = [{str(k).strip().lower(): (v or "").strip() for k, v in line.items()} for line in lines]
    if not rows or "image" not in rows[0]:
        raise DataError(f"{path} has no column 'image'. Columns are image, and if wanted label, case, patient, split "
                        "(train, val or test) and stratum.")  # fmt: skip
    pairs = []
    for number, row in enumerate(rows, 2):
        role = row.get("split", "").lower()
        if role and role not in ROLES:
            raise DataError(f"{path}, line {number}: the split '{role}' is none of train, val, test. Correct it.")
        image = inside(path.parent, row["image"], search.follow_links, path)
        label = inside(path.parent, row["label"], search.follow_links, path) if row.get("label") else None
        case = row.get("case") or channel_of(case_stem(image))[0]
        pairs.append(Pair(case, image, label, row.get("patient", ""), ROLES.get(role, ""), row.get("stratum", "")))
    return Found(f"the table {path.name}", tuple(pairs))


def _dataset_json(source: Path) -> dict[str, Any]:
    path = source / "dataset.json"
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON ({error}). Repair or remove it.") from error
    return facts if isinstance(facts, dict) else {}


def _is_msd(facts: Mapping[str, Any]) -> bool:
    training = facts.get("training")
    return isinstance(training, list) and bool(training) and all(isinstance(t, dict) and "image" in t for t in training)


def _from_msd(source: Path, facts: Mapping[str, Any], search: Search) -> Found:
    where = source / "dataset.json"
    pairs = []
    for entry in facts["training"]:
        image = inside(source, str(entry["image"]), search.follow_links, where)
        label = inside(source, str(entry["label"]), search.follow_links, where) if entry.get("label") else None
        pairs.append(Pair(case_stem(image), image, label))
    tests = facts.get("test") or []
    left_out = {str(t): "a test image without a label: nothing can be scored on it" for t in tests}
    return Found("MSD's dataset.json", tuple(pairs), _class_names(facts), left_out, _said(facts))


def _class_names(facts: Mapping[str, Any]) -> dict[int, str]:
    """Raw value -> name: MSD writes ``{"1": "liver"}``, nnU-Net ``{"liver": 1}``; lists of values name regions."""
    labels = facts.get("labels")
    if not isinstance(labels, Mapping):
        return {}
    turned = {str(v): k for k, v in labels.items()} if all(isinstance(v, int) for v in labels.values()) else labels
    if not all(str(value).isdecimal() and isinstance(name, str) for value, name in turned.items()):
        return {}
    return {int(value): str(name) for value, name in turned.items()}


def _said(facts: Mapping[str, Any]) -> dict[str, str]:
    """Title, modality, licence and origin, where dataset.json states them."""
    modality = facts.get("modality") or facts.get("channel_names") or {}
    words = ", ".join(str(v) for v in modality.values()) if isinstance(modality, Mapping) else str(modality)
    said = {"title": facts.get("name"), "modality": words, "licence": facts.get("licence") or facts.get("license"),
            "origin": facts.get("reference")}  # fmt: skip
    return {key: str(value) for key, value in said.items() if value}


# ---------------------------------------------------------------------------------------------------------------------
# two folders


def _from_folders(listing: Listing, search: Search) -> Found | None:
    """Images in one folder, labels in another: imagesTr/labelsTr, or images/labels, also below train, val and test."""
    folders: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in listing.images:
        parts = [part.lower() for part in path.parent.parts]
        if len(parts) in (1, 2) and (len(parts) == 1 or parts[0] in ROLES):
            kind, role = _folder_kind(parts[-1])
            if kind:
                folders[role or (ROLES[parts[0]] if len(parts) == 2 else "")][kind].append(path)
    if not any(kinds["image"] and kinds["label"] for kinds in folders.values()):
        return None
    pairs, left_out = [], {}
    nnunet = "Tr" in folders
    for name, kinds in folders.items():
        role = {"Tr": "train" if folders.get("Ts", {}).get("label") else "", "Ts": "test"}.get(name, name)
        matched, alone = _matched(listing, kinds["image"], kinds["label"], search)
        left_out.update({str(path): "a label without an image" for path in alone})
        for case, image, label in matched:
            if name == "Ts" and label is None:
                left_out[str(image)] = "a test image without a label: nothing can be scored on it"
            else:
                pairs.append(Pair(case, listing.root / image, label and listing.root / label, role=role))
    return Found("nnU-Net's imagesTr and labelsTr" if nnunet else "a folder of images and one of labels",
                 tuple(pairs), left_out=left_out)  # fmt: skip


def _folder_kind(name: str) -> tuple[str, str]:
    """("image" or "label" or "", "Tr" or "Ts" or "")."""
    part = (
        {"tr": "Tr", "ts": "Ts"}.get(name[-2:], "") if name in ("imagestr", "labelstr", "imagests", "labelsts") else ""
    )
    bare = name[:-2] if part else name
    return ("image" if bare in IMAGE_FOLDERS else "label" if bare in LABEL_FOLDERS else ""), part


def _matched(
    listing: Listing, images: Sequence[Path], labels: Sequence[Path], search: Search
) -> tuple[list[tuple[str, Path, Path | None]], list[Path]]:
    """(case, image, label or None) of every image, and the labels without one."""
    by_stem = _unique(labels, lambda path: case_stem(path))
    chosen = _channels(images, set(by_stem), search.channel)
    matched: list[tuple[str, Path, Path | None]] = []
    if any(stem in by_stem for stem in chosen):
        matched = [(stem, image, by_stem.get(stem)) for stem, image in chosen.items()]
    else:
        by_key = _unique(labels, lambda path: key_of(case_stem(path)))
        keyed = _unique(chosen.values(), lambda path: key_of(channel_of(case_stem(path))[0]))
        if not set(keyed) & set(by_key):
            few = f"{images[0]} and {labels[0]}" if images and labels else f"{(images or labels)[0]}"
            if images and labels:
                raise DataError(f"{listing.root}: no label has the name of an image ({few}, for example). Name them "
                                "alike, or list the pairs in a .csv with columns image and label.")  # fmt: skip
        matched = [(key, image, by_key.get(key)) for key, image in keyed.items()]
    used = {label for _, _, label in matched}
    return matched, [label for label in labels if label not in used]


def _channels(images: Sequence[Path], labels: set[str], channel: int | None) -> dict[str, Path]:
    """Case -> image file; of several channels the one that was asked for."""
    split = {path: channel_of(case_stem(path)) for path in images}
    numbered = bool(images) and all(c is not None for _, c in split.values()) and not labels & {
        case_stem(path) for path in images
    }  # fmt: skip
    if not numbered:
        return _unique(images, case_stem)
    known = sorted({c for _, c in split.values() if c is not None})
    if channel is None and len(known) > 1:
        raise DataError(f"{images[0].parent} holds the channels {', '.join(map(str, known))} of each case. Say which "
                        "one is meant with --channel.")  # fmt: skip
    wanted = known[0] if channel is None or len(known) == 1 else channel
    if wanted not in known:
        raise DataError(f"{images[0].parent} has no channel {wanted}, but {', '.join(map(str, known))}. Correct "
                        "--channel.")  # fmt: skip
    return _unique([path for path, (_, c) in split.items() if c == wanted], lambda path: split[path][0])


def _unique(paths: Iterable[Path], name: Any) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        key = name(path)
        if key in found:
            raise DataError(f"{found[key]} and {path} are both the case '{key}'. Rename or remove one of them.")
        found[key] = path
    return found


# ---------------------------------------------------------------------------------------------------------------------
# names that match


def _from_names(listing: Listing, search: Search) -> Found:
    """Pairs anywhere below the folder, by their names: BIDS, ``X`` and ``X_seg``, ``X/image`` and ``X/label``."""
    labels: dict[str, Path] = {}
    images: list[Path] = []
    for path in listing.images:
        stem = case_stem(path)
        if not is_label(path, stem):
            images.append(path)
            continue
        key = _scan(path, key_of(stem))
        if key in labels:
            raise DataError(f"{labels[key]} and {path} are both labels of '{key}'. Keep one of them in the folder, or "
                            "list the pairs in a .csv with columns image and label.")  # fmt: skip
        labels[key] = path
    by_case: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in images:
        case, contrast = _case(path, labels, search.contrast)
        if search.contrast is None or contrast.lower() == search.contrast.lower():
            by_case[case].append((contrast, path))
    if not by_case:
        raise DataError(f"{listing.root} has no image whose name ends in '{search.contrast}'. Correct --contrast.")
    pairs = []
    for case, choices in by_case.items():
        if len(choices) > 1:
            known = ", ".join(sorted(contrast or path.name for contrast, path in choices))
            raise DataError(f"{listing.root} has several images of the case '{case}': {known}. Choose with --contrast, "
                            "or list the pairs in a .csv with columns image and label.")  # fmt: skip
        label = labels.pop(case, None)
        pairs.append(Pair(case, listing.root / choices[0][1], label and listing.root / label))
    left_out = {str(path): "a label without an image" for path in labels.values()}
    return Found("images and labels with matching names", tuple(pairs), left_out=left_out)


def _scan(path: Path, key: str) -> str:
    """What tells the scan of a label apart: its BIDS entities, its name, or its folder if the name says nothing."""
    bids = bids_key(case_stem(path))
    return bids[0] if bids else key or "_".join(path.parent.parts)


def _case(path: Path, labels: Mapping[str, Path], contrast: str | None) -> tuple[str, str]:
    """(case, contrast) of an image: the longest beginning of its name that is a label's, and the rest."""
    stem = case_stem(path)
    bids = bids_key(stem)
    if bids:
        return bids
    key = key_of(stem) or "_".join(path.parent.parts)
    for start, rest in prefixes(key):
        if start in labels:
            return start, rest
    folder = "_".join(path.parent.parts)
    if folder in labels:
        return folder, key
    if contrast and key.lower().endswith(contrast.lower()):
        return key[: -len(contrast)].rstrip("_-. ") or folder, contrast
    return key, contrast or ""
