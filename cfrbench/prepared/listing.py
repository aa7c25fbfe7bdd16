"""What lies in a stranger's folder: every file once, in bounded time, links that lead out refused."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cfrbench.errors import DataError
from cfrbench.prepared.nifti import SUFFIXES

#: a folder with more entries than this is somebody's home, not a data set
MOST = 200_000
#: files that are opened to see whether they are DICOM
_PROBED = 32
_DICOM = (".dcm", ".ima", ".dicom")


@dataclass(frozen=True)
class Listing:
    """The files below ``root``, sorted; their paths are relative to it."""

    root: Path
    files: tuple[Path, ...]

    @property
    def images(self) -> list[Path]:
        """Those named as NIfTI files."""
        return [path for path in self.files if path.name.lower().endswith(SUFFIXES)]


def list_folder(root: Path, follow_links: bool = False, most: int = MOST) -> Listing:
    """List a folder with everything below it; hidden files are passed over. Each entry is looked at once.

    DataError if it does not exist, is empty, has more than ``most`` entries, or holds links that lead out of it (or
    nowhere) which are not to be followed.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.is_file() else "does not exist"
        raise DataError(f"{root} {what}. Give the folder that holds the images, or a .csv that lists them.")
    home, files, folders, seen = root.resolve(), [], [Path()], 0
    while folders:
        folder = folders.pop()
        for entry in _entries(root / folder):
            seen += 1
            if seen > most:
                raise DataError(f"{root} holds more than {most} files and folders. Give the folder of one data set, or "
                                "a .csv that lists its files.")  # fmt: skip
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not follow_links:
                _require_inside(Path(entry.path), home)
            if not entry.is_dir():
                files.append(folder / entry.name)
            elif not entry.is_symlink() or (follow_links and not _is_above(Path(entry.path), home)):
                folders.append(folder / entry.name)
    if not files:
        raise DataError(f"The folder {root} is empty. Give the folder that holds the images.")
    return Listing(root, tuple(sorted(files)))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror or error}. Change its permissions.") from error


def _require_inside(link: Path, home: Path) -> None:
    target = Path(os.path.realpath(link))
    if not target.exists():
        raise DataError(f"{link} is a symbolic link to {target}, which does not exist. Restore it, or remove the link.")
    if not target.is_relative_to(home):
        raise DataError(f"{link} is a symbolic link that leads out of the folder, to {target}. If that is meant, allow "
                        "it with --follow-links.")  # fmt: skip


def _is_above(link: Path, home: Path) -> bool:
    """Whether a linked folder holds the folder that is listed, so that following it would not end."""
    target = Path(os.path.realpath(link))
    return home.is_relative_to(target) or target.is_relative_to(home)


def inside(root: Path, name: str, follow_links: bool, where: Path) -> Path:
    """The file that a manifest names; DataError if it is missing, or lies elsewhere and that is not allowed."""
    path = root / name
    if not path.is_file():
        raise DataError(f"{where} names {name!r}, but there is no file {path}. Correct the entry, or add the file.")
    if not follow_links and not Path(os.path.realpath(path)).is_relative_to(root.resolve()):
        raise DataError(f"{where} names {name!r}, which lies outside of {root}. If that is meant, allow it with "
                        "--follow-links.")  # fmt: skip
    return path


def refuse_without_images(listing: Listing) -> None:
    """Raise the DataError that helps most with a folder without NIfTI files; nothing if there are some."""
    if listing.images:
        return
    if any(path.suffix.lower() in _DICOM for path in listing.files) or _holds_dicom(listing):
        raise DataError(f"{listing.root} holds DICOM files. Convert each series to one NIfTI volume first, for example "
                        "with `dcm2niix -z y -f %i_%s -o NIFTI_FOLDER DICOM_FOLDER`, and put the labels beside "
                        "them.")  # fmt: skip
    kinds = ", ".join(f"{count} {kind or 'without ending'}" for kind, count in
                      Counter("".join(p.suffixes[-2:]).lower() for p in listing.files).most_common(4))  # fmt: skip
    raise DataError(f"{listing.root} holds no NIfTI file (.nii, .nii.gz), but {kinds}. Convert the images first; "
                    "SimpleITK and nibabel read most formats.")  # fmt: skip


def _holds_dicom(listing: Listing) -> bool:
    return any(_is_dicom(listing.root / path) for path in listing.files[:_PROBED])


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
