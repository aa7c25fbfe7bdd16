"""Checkpoints: where they lie, how they are fetched, checked and read.

A digest is SHA-256 in hexadecimal; its first digits are enough where the whole is not known. Nothing here can run
code that a checkpoint carries.
"""

from __future__ import annotations

import os
import pickle
import re
import shlex
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench.errors import WeightsError
from cfrbench.files import sha256_file

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20  # bytes per read
TIMEOUT_S = 30.0
#: names under which training scripts wrap the tensors of a checkpoint
WRAPPERS = ("model", "state_dict", "model_state_dict")
#: width and depth of the image encoder -> the model
VITS: dict[tuple[int, ...], str] = {(768, 12): "SAM ViT-B", (1024, 24): "SAM ViT-L", (1280, 32): "SAM ViT-H"}
#: shape of the first convolution of a TinyViT encoder -> the model
TINY_VITS: dict[tuple[int, ...], str] = {(32, 3, 1, 1): "LiteMedSAM", (32, 3, 3, 3): "MobileSAM"}
#: a name that only the encoder of SAM-Med2D has
MED2D_ADAPTER = "image_encoder.blocks.0.Adapter.spatial.0.weight"
#: model -> SHA-256 of its released checkpoint; some have the same shapes
RELEASED = {
    "SAM ViT-B": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "SAM ViT-L": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "SAM ViT-H": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    "MobileSAM": "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    "LiteMedSAM": "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
}
HAND_OVER = "hand it over with `cfrbench model get NAME --from FILE`."
#: what torch says of a name it will not import
_GLOBAL = re.compile(r"(?:GLOBAL|global:?) (\w+(?:\.\w+)+)")


def weights_folder() -> Path:
    """Where checkpoints are looked for: ``CFRBENCH_WEIGHTS``, else the user's cache."""
    if folder := os.environ.get("CFRBENCH_WEIGHTS"):
        return Path(folder).expanduser()
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_home).expanduser() / "cfrbench" / "weights"


def fetch_command(url: str, target: Path) -> str:
    """The shell command that fetches ``url`` to ``target`` and goes on after an interruption."""
    return f"curl --location --create-dirs --continue-at - --output {shlex.quote(str(target))} {shlex.quote(url)}"


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_checkpoint(path: Path, sha256: str | None = None, expected: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a ``.pth`` or ``.safetensors`` file, on the CPU.

    ``sha256`` is the digest or its first digits, ``expected`` the model as `recognise` names it. WeightsError if the
    file is missing, damaged, not a checkpoint, or does not answer to either.
    """
    if not path.is_file():
        raise WeightsError(f"There is no checkpoint at {path}. Give the path of an existing file.")
    tensors = _unwrap(path, _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path))
    found = recognise(tensors)
    if expected is not None and found != expected:
        raise WeightsError(f"{path} is {found}, but {expected} was asked for. Name the matching model, "
                           f"or give a checkpoint of {expected}.")  # fmt: skip
    if sha256 is not None:  # last, because a digest alone says least about what is wrong
        _require_digest(path, sha256, "Fetch it again, or name the file you mean by its path.")
    return tensors


def digest_of(path: Path) -> str:
    """SHA-256 of a file; read once per process as long as its size and time stay the same."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _digest(path: Path, _size: int, _time_ns: int) -> str:
    return sha256_file(path)


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """The model a state dict belongs to, told by the names and shapes of its image encoder."""
    position = tensors.get("image_encoder.pos_embed")
    if position is not None:
        width = position.shape[-1]
        depth = len({name.split(".")[2] for name in tensors if name.startswith("image_encoder.blocks.")})
        name = VITS.get((width, depth), f"a SAM of {depth} blocks and width {width}")
        return "SAM-Med2D" if MED2D_ADAPTER in tensors else name
    stem = tensors.get("image_encoder.patch_embed.seq.0.c.weight")
    if stem is not None:
        return TINY_VITS.get(tuple(stem.shape), "a TinyViT with an unknown stem")
    return "no SAM-like model"


def _require_digest(path: Path, sha256: str, remedy: str) -> None:
    found = digest_of(path)
    if not sha256 or not found.startswith(sha256.lower()):
        raise WeightsError(f"{path} is damaged or another file: its SHA-256 is {found}, expected "
                           f"{_shown(sha256)}. {remedy}")  # fmt: skip


def _shown(sha256: str) -> str:
    return sha256 if len(sha256) == 64 else f"{sha256}..."


def _read_pickle(path: Path) -> Any:
    import torch

    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    # The table of contents stands at the end of a zip archive: a beginning without an end was cut off.
    if archive and not zipfile.is_zipfile(path):
        raise _truncated(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, AttributeError, OSError) as error:
        if path.stat().st_size == 0 or isinstance(error, EOFError):
            raise _truncated(path) from error
        if code := _GLOBAL.search(str(error)):
            raise _carries_code(path, code[1]) from error
        # What torch says first is how to load the file unsafely, which is no advice for a file that nobody knows.
        reason = "not in the format of torch.save" if isinstance(error, pickle.UnpicklingError) else str(error)
        raise _not_a_checkpoint(path, reason.partition("\n")[0]) from error


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        if path.stat().st_size < 8 or "incomplete" in str(error).lower():
            raise _truncated(path) from error
        raise _not_a_checkpoint(path, str(error)) from error


def _unwrap(path: Path, content: Any) -> dict[str, Tensor]:
    import torch

    if isinstance(content, Mapping):
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
        # Training on several GPUs puts "module." before every name.
        tensors = {
            str(name).removeprefix("module."): value for name, value in inner.items() if isinstance(value, torch.Tensor)
        }
        if tensors:
            return tensors
    raise _not_a_checkpoint(path, "it holds no named tensors")


def _truncated(path: Path) -> WeightsError:
    return WeightsError(f"{path} is cut off after {path.stat().st_size:,} bytes. Fetch it again.")


def _carries_code(path: Path, name: str) -> WeightsError:
    return WeightsError(f"{path} holds more than tensors: to load it, Python would have to run `{name}`, and a file "
                        "can name any program there. Checkpoints are read as tensors only, so nothing was run. If you "
                        "trust where it comes from, load it yourself with torch.load(PATH, weights_only=False), save "
                        "its state_dict() with torch.save, and give that file.")  # fmt: skip


def _not_a_checkpoint(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path} is not a checkpoint of tensors ({reason}). A failed download may have saved an error "
                        "page under this name: fetch the file again, or give the path of another.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# fetching


def download(url: str, target: Path, sha256: str | None, progress: Callable[[int, int], None] | None = None) -> Path:
    """Fetch ``url`` to ``target``, going on where an earlier attempt stopped; return ``target``.

    ``sha256`` is the digest or its first digits, None where none was published: then only the length is checked.
    ``progress`` gets bytes done and bytes in all (0 if the server does not say). The file appears whole and verified
    or not at all; until then it grows as ``target.part``. WeightsError if the network, the disk or the digest fails.
    """
    if target.exists():
        if sha256 is not None:
            _require_digest(target, sha256, "Remove it, then fetch it again.")
        return target
    part = target.with_name(target.name + ".part")
    with _failures(url, part):
        target.parent.mkdir(parents=True, exist_ok=True)
        total = _append(url, part, progress or _silent)
        size = part.stat().st_size
        if size < total:
            raise WeightsError(f"The download of {url} broke off after {size:,} of {total:,} bytes. Give the same "
                               "command again: it goes on from there.")  # fmt: skip
        if sha256 is not None:
            _verify(part, sha256, url)
        part.replace(target)
    return target


def _append(url: str, part: Path, progress: Callable[[int, int], None]) -> int:
    """Fetch what ``part`` still lacks; return the size of the whole, 0 if the server does not say."""
    have = part.stat().st_size if part.exists() else 0
    try:
        answer = urllib.request.urlopen(_request(url, have), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        # Nothing stands behind the bytes that are here: all of it has arrived, or the file was replaced. The digest,
        # which is checked next, tells which.
        return have
    with answer, part.open("ab" if answer.status == 206 else "wb") as file:
        have = file.tell()  # 0 if the server cannot resume and sends everything again
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else 0
        while block := answer.read(BLOCK):
            file.write(block)
            have += len(block)
            progress(have, total)
        file.flush()
        os.fsync(file.fileno())
    return total


def _request(url: str, have: int) -> urllib.request.Request:
    # Some archives turn away the name that Python's library gives itself.
    headers = {"User-Agent": "cfrbench"} | ({"Range": f"bytes={have}-"} if have else {})
    return urllib.request.Request(url, headers=headers)


def _verify(part: Path, sha256: str, url: str) -> None:
    found = sha256_file(part)
    if not found.startswith(sha256.lower()):
        part.unlink()  # to go on from wrong bytes would never end well
        raise WeightsError(f"What {url} sent has the SHA-256 {found}, expected {_shown(sha256)}. It was removed. Try "
                           "again; if it stays so, the address serves another file.")  # fmt: skip


def copy_checkpoint(source: Path, target: Path) -> Path:
    """Copy a file so that ``target`` is whole or as before; return ``target``. WeightsError if it cannot be written."""
    if target.exists() and target.samefile(source):
        return target
    copy = target.with_name(target.name + ".copy")
    with _writing(copy):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        copy.replace(target)
    return target


@contextmanager
def _failures(url: str, part: Path) -> Iterator[None]:
    with _writing(part):
        try:
            yield
        except urllib.error.HTTPError as error:
            raise WeightsError(f"{url} answered {error.code} {error.reason}. Check the address, or fetch the file by "
                               f"other means and {HAND_OVER}") from error  # fmt: skip
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or error
            raise WeightsError(f"{url} cannot be fetched: {reason}. Check the connection and give the same command "
                               "again: it goes on where it stopped. Where there is no network, fetch the file on "
                               f"another machine and {HAND_OVER}") from error  # fmt: skip


@contextmanager
def _writing(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsError(f"{part} cannot be written: {error.strerror or error}. Free space there or choose another "
                           "folder with CFRBENCH_WEIGHTS.") from error  # fmt: skip


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody watches."""
