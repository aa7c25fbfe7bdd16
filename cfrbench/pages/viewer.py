"""The volume viewer of a page: NiiVue from an installed package, and the volumes it shows, all inside the page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfrbench.images import encode_volume
from cfrbench.pages.material import Group, Material

#: the package that ships NiiVue, where its script lies in it, and the extra that installs it
PACKAGE, SCRIPT, EXTRA = "ipyniivue", "static/widget.js", "viewer"
#: what volumes may take inside a page; browsers open larger ones slowly
VOLUME_BYTES = 48 * 2**20
#: how far before its methods a class may begin
_REACH = 200_000
_CLASS = re.compile(r"(?:\b([\w$]+)\s*=\s*class|\bclass\s+([\w$]+))\b[^{};()]*\{")


def niivue_script() -> tuple[str, str] | None:
    """The text of a module script that puts the class into ``window.Niivue``, and who made it; None without the extra.

    The package ships one bundle for notebooks, which exports a widget but not the class. The class is the one in which
    the bundle defines ``attachToCanvas``; inside the module its name can be used.
    """
    found = util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    bundle = (Path(found.origin).parent / SCRIPT).read_text(encoding="utf-8")
    name = _class_around(bundle, "async attachToCanvas(")
    if name is None:
        return None
    text = f"{bundle}\n;window.Niivue = {name};\n"
    # Inside a page a script ends at these letters, wherever they stand.
    safe = re.sub(r"<(?=/script|!--)", r"\\x3C", text, flags=re.IGNORECASE)
    return safe, f"NiiVue (BSD-2-Clause), from {PACKAGE} {metadata.version(PACKAGE)}"


def _class_around(bundle: str, method: str) -> str | None:
    """Name of the last class that begins before a method's definition."""
    place = bundle.find(method)
    before = list(_CLASS.finditer(bundle, max(place - _REACH, 0), max(place, 0)))
    return before[-1][1] or before[-1][2] if before else None


def case_payload(material: Material, groups: Sequence[Group], case: str) -> str:
    """One case as JSON: image, truth and the label maps of every group, each a base64 ``.nii.gz``."""
    volume = material.volume(case)

    def encoded(array: NDArray[Any]) -> str:
        assert material.source is not None
        return base64.b64encode(encode_volume(array, volume.spacing_mm, material.source.axcodes)).decode()

    layers = {layer.key: layer for group in groups for layer in group.layers if case in layer.masks}
    return json.dumps({
        "case": case,
        "image": encoded(grey(volume.image.numpy())),
        "truth": encoded(material.truth(case)),
        "masks": {key: encoded(layer.masks[case]) for key, layer in layers.items()},
        "dice": {key: round(layer.dice[case], 2) for key, layer in layers.items()},
    })  # fmt: skip


def grey(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Intensities as 256 greys between percentiles 0.5 and 99.5: what a screen shows, in a quarter of the bytes."""
    low, high = np.percentile(image, (0.5, 99.5))
    greys: NDArray[np.uint8] = np.rint(np.clip((image - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
    return greys


def payloads(material: Material, groups: Sequence[Group]) -> tuple[list[tuple[str, str]], list[str]]:
    """Case and JSON of as many test cases as fit into `VOLUME_BYTES`, and the cases that do not."""
    found: list[tuple[str, str]] = []
    left_out, used = [], 0
    for case in material.test_cases:
        text = case_payload(material, groups, case)
        if used + len(text) > VOLUME_BYTES:
            left_out.append(case)
            continue
        used += len(text)
        found.append((case, text))
    return found, left_out
