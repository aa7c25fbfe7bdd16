"""A whole LA volume predicted by sliding windows, in a process of its own: the official loop, MONAI's, or ours.

    python -m benchmarks.predict_volume train|official|monai|fp32|bf16 FILE FOLDER WINDOWS

prints one JSON object: seconds and processor seconds, windows, the share of voxels whose label is not that of the mask
which the variant `official` left in FOLDER, and Dice with the truth in percent. The variant `train` makes the network
that all others predict with, in a process of its own, so that what it leaves in memory helps none of them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from cfrbench.heap import keep_freed_memory
from cfrbench.machine import peak_mib

if __name__ == "__main__" and sys.argv[1] not in ("official", "monai"):
    keep_freed_memory()  # as the command line does, before torch makes its first tensor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.retrain_step import vnet
from benchmarks.test_sample_speed import read
from cfrbench import registry
from cfrbench.compute import Compute, seed_torch
from cfrbench.config import ComputeSection, Settings
from cfrbench.inference import window_starts
from cfrbench.losses import ce_dice, class_map
from cfrbench.pipeline import Bench, for_prediction, probabilities_of
from cfrbench.training import sgd

CLASSES, TRAINED = 2, 400
SETTINGS = Settings()
PATCH = SETTINGS.training.patch
STRIDES = (SETTINGS.inference.stride_xy, SETTINGS.inference.stride_xy, SETTINGS.inference.stride_z)


def trained(image: NDArray[Any], label: NDArray[Any], file: Path) -> nn.Module:
    """The V-Net after a short training on crops of the volume; kept in ``file``.

    Long enough that it is sure of most voxels: the fewer scores lie near 0.5, the fewer labels rounding decides.
    """
    seed_torch(0, "init")
    network: nn.Module = vnet()
    if file.exists():
        network.load_state_dict(torch.load(file, weights_only=True))
        return network.eval()
    optimiser = sgd(list(network.parameters()), 0.01, 0.9, 1e-4)
    draw = np.random.default_rng(0)
    for _ in range(TRAINED):
        start = [int(draw.integers(0, size - side + 1)) for size, side in zip(image.shape, (64, 64, 32), strict=True)]
        crop = tuple(slice(first, first + side) for first, side in zip(start, (64, 64, 32), strict=True))
        loss = ce_dice(network(torch.from_numpy(image[crop].copy())[None, None]), torch.from_numpy(label[crop])[None])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    torch.save(network.state_dict(), file)
    return network.eval()


def official(network: nn.Module, image: NDArray[Any]) -> NDArray[Any]:
    """Window by window, scores added in numpy (ShumengLI/CFR code/test_util_singleclass.py)."""
    score = np.zeros((CLASSES, *image.shape), dtype=np.float32)
    visits = np.zeros(image.shape, dtype=np.float32)
    xs, ys, zs = (window_starts(*axis) for axis in zip(image.shape, PATCH, STRIDES, strict=True))
    with torch.no_grad():
        for x in xs:
            for y in ys:
                for z in zs:
                    box = tuple(slice(first, first + side) for first, side in zip((x, y, z), PATCH, strict=True))
                    window = torch.from_numpy(image[box][None, None].astype(np.float32))
                    probability = F.softmax(network(window), dim=1).numpy()[0]
                    score[(slice(None), *box)] += probability
                    visits[box] += 1
    return np.argmax(score / visits[None], axis=0).astype(np.uint8)


def monai(network: nn.Module, image: NDArray[Any]) -> NDArray[Any]:
    """MONAI's sliding window on the same windows: its overlap gives these strides."""
    from monai.inferers import sliding_window_inference

    # It rounds the step down, so a hair is taken off the overlap.
    overlap = [1 - stride / side - 1e-6 for stride, side in zip(STRIDES, PATCH, strict=True)]
    with torch.no_grad():
        score: Tensor = sliding_window_inference(
            torch.from_numpy(image)[None, None], PATCH, 1, lambda window: F.softmax(network(window), dim=1),
            overlap=overlap,
        )  # fmt: skip
    return score[0].argmax(0).numpy().astype(np.uint8)


def ours(network: nn.Module, image: NDArray[Any], precision: str) -> NDArray[Any]:
    """As `cfrbench` predicts a case."""
    compute = Compute(torch.device("cpu"), precision)
    source = registry.load("data", "phantom")()
    bench = Bench(source, SETTINGS, compute, None)  # type: ignore[arg-type] # the volume is here already
    assert source.num_classes == CLASSES
    network = for_prediction(compute, compute.place(network))
    score = probabilities_of(bench, network, torch.from_numpy(image))
    return class_map(score[None])[0].numpy()


def cut(volume: NDArray[Any], windows: int) -> NDArray[Any]:
    """The volume's first slices, no more than ``windows`` windows need."""
    count = 1
    for size, side, stride in zip(volume.shape[:2], PATCH, STRIDES, strict=False):
        count *= len(window_starts(size, side, stride))
    depth = PATCH[2] + STRIDES[2] * max(0, windows // count - 1)
    return np.ascontiguousarray(volume[:, :, :depth])


def measure(variant: str, file: Path, folder: Path, windows: int) -> dict[str, float]:
    """Predict once and compare with what the official loop left."""
    torch.set_num_threads(ComputeSection().threads)
    image, label = (cut(volume, windows) for volume in read(file))
    network = trained(image, label, folder / "weights.pt")
    if variant == "train":
        return {}
    ways = {"official": official, "monai": monai}
    began, worked = time.perf_counter(), time.process_time()
    mask = ways[variant](network, image) if variant in ways else ours(network, image, variant)
    found = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    if variant == "official":
        np.save(folder / "mask.npy", mask)
    expected = np.load(folder / "mask.npy")
    both, sizes = int((mask * label).sum()), int(mask.sum()) + int(label.sum())
    axes = [len(window_starts(*axis)) for axis in zip(image.shape, PATCH, STRIDES, strict=True)]
    return found | {"windows": float(np.prod(axes)), "differ": float((mask != expected).mean()),
                    "dice": 200.0 * both / max(sizes, 1), "peak_mib": peak_mib()}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
