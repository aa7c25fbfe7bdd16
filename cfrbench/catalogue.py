"""What can be said of a foundation model and its weights before anything is run, and how the weights get here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cfrbench import registry
from cfrbench.config import Frozen, validate
from cfrbench.errors import UsageError, WeightsError
from cfrbench.parameters import count_model
from cfrbench.pretrained import Pretrained
from cfrbench.weights import digest_of

#: masks of a decoder as SAM releases it
SAM_MASKS = 4


def about(name: str) -> dict[str, Any]:
    """Name, title, encoder, input size, licence, and whether the weights are here; imports no network."""
    cls = registry.load("model", name)
    return {
        "name": cls.name,
        "title": cls.title,
        "encoder": cls.encoder,
        "input_size": _options(cls).input_size,
        "licence": cls.licence,
        "weights": _state(cls),
    }


def details(name: str) -> dict[str, Any]:
    """What else there is to know: parameters, input sizes, normalisation, origin, file, digest, warnings."""
    cls = registry.load("model", name)
    found = {
        "parameters": count_model(cls(_options(cls)), SAM_MASKS),
        "input_sizes": _sizes(cls.Config),
        "sees": inspect.cleandoc(cls.normalise.__doc__ or "").partition("\n\n")[0].replace("\n", " "),
        "origin": cls.origin,
    }
    if issubclass(cls, Pretrained):
        found |= {"file": str(cls.home()), "sha256": cls.release.sha256 or "not published"}
        if cls.release.megabytes:
            found["size"] = f"{cls.release.megabytes} MB"
    return found | ({"note": cls.note} if cls.note else {})


def fetch(name: str, folder: Path | None, progress: Callable[[int, int], None]) -> Path:
    """Download and verify the weights of a model; WeightsError or UsageError if that is impossible."""
    return _pretrained(name).fetch(folder, progress)


def adopt(name: str, source: Path, folder: Path | None) -> Path:
    """Verify a file that somebody has and copy it to where the model is looked for."""
    return _pretrained(name).adopt(source, folder)


def digest(path: Path) -> str:
    """SHA-256 of a file, read once."""
    return digest_of(path)


def _pretrained(name: str) -> type[Pretrained]:
    cls = registry.load("model", name)
    if not issubclass(cls, Pretrained):
        raise UsageError(f"'{name}' has no checkpoint to get: {cls.origin}.")
    return cls


def _options(cls: Any) -> Any:
    return validate(cls.Config, {}, f"the options of model.{cls.name}")


def _sizes(config: type[Frozen]) -> str:
    """``multiples of 16 from 32``, as the option says."""
    schema = config.model_json_schema()["properties"]["input_size"]
    return f"multiples of {schema.get('multipleOf', 1)} from {schema.get('minimum', 1)}"


def _state(cls: type[Any]) -> str:
    if not issubclass(cls, Pretrained):
        return "none needed"
    try:
        return "here" if cls(_options(cls)).path.is_file() else "missing"
    except WeightsError:
        return "missing"
