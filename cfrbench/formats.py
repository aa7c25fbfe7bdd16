"""How arrays and tables lie on disk: tensors as safetensors, tables as Parquet, label volumes as one compressed npz.

Equal content gives equal bytes. Nothing here can run code when it is read.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench.config import canonical
from cfrbench.errors import StoreError
from cfrbench.files import storage_errors

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

#: safetensors keeps metadata in an unordered map: one entry that holds all of it gives the same bytes every time
_METADATA = "cfrbench"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write named tensors and JSON-able ``metadata`` as one safetensors file."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # `save_file` would hide a full disk in an exception of its own and make the file unreadable for a group.
    _write(path, save(whole, {_METADATA: canonical(dict(metadata or {}))}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; StoreError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _read(path)
    try:
        return load(data)
    except SafetensorError as error:
        raise _damaged(path, "safetensors file", error) from error


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write_tensors` was given as metadata; an empty dict for a file from elsewhere."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA, "{}")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, "safetensors file", error) from error
    values: dict[str, Any] = json.loads(text)
    return values


def write_table(path: Path, table: DataFrame) -> None:
    """Write a data frame as Parquet; its index is not kept."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    _write(path, buffer.getvalue())


def read_table(path: Path) -> DataFrame:
    """The data frame of a Parquet file; StoreError if it is missing or damaged."""
    import pandas as pd
    from pyarrow import ArrowException

    data = _read(path)
    try:
        return pd.read_parquet(io.BytesIO(data))
    except (ArrowException, OSError, ValueError) as error:
        raise _damaged(path, "Parquet table", error) from error


def write_labels(path: Path, labels: Mapping[str, Tensor]) -> None:
    """Write case -> uint8 label volume ``(H, W, D)``, readable by ``numpy.load`` under the case names.

    Eight left atria (190 x 140 x 88) take 0.1 s and 0.13 MB; packing two classes to bits first would halve the file
    and lose that readability.
    """
    import numpy as np

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for case, label in labels.items():
            volume = io.BytesIO()
            np.save(volume, np.ascontiguousarray(_uint8(case, label)), allow_pickle=False)
            # A ZipInfo carries the format's first day instead of the hour of writing: equal labels, equal bytes.
            entry = zipfile.ZipInfo(f"{case}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, volume.getvalue())
    _write(path, buffer.getvalue())


def read_labels(path: Path) -> dict[str, Tensor]:
    """Case -> uint8 label volume ``(H, W, D)``; StoreError if the file is missing or damaged."""
    import numpy as np
    import torch

    data = _read(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {case: torch.from_numpy(archive[case]) for case in archive.files}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError) as error:
        raise _damaged(path, "label archive", error) from error


def _uint8(case: str, label: Tensor) -> Any:
    import torch

    if label.dtype != torch.uint8 or label.ndim != 3:
        raise StoreError(f"The label of case '{case}' is {label.dtype} with shape {tuple(label.shape)}; label volumes "
                         "are stored as uint8 (H, W, D). Convert it first.")  # fmt: skip
    return label.detach().cpu().numpy()


def _write(path: Path, data: bytes) -> None:
    with storage_errors("write", path):
        path.write_bytes(data)


def _read(path: Path) -> bytes:
    with storage_errors("read", path):
        return path.read_bytes()


def _damaged(path: Path, kind: str, error: Exception) -> StoreError:
    return StoreError(f"{path} is not a readable {kind} ({error}). Remove it and give the same command again: "
                      "what is missing is computed again.")  # fmt: skip
