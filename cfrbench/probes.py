"""How fast this machine is, in about a minute, and what each preset will take on it: `cfrbench doctor --bench`."""

from __future__ import annotations

import itertools
import math
import tempfile
import timeit
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cfrbench import forecast, registry, sweep
from cfrbench.compute import Compute, seed_torch, start
from cfrbench.config import ComputeSection, PresetName, RunConfig, Settings, TrainingSection, Triple
from cfrbench.contracts import Batch
from cfrbench.diagnosis import Finding
from cfrbench.heap import large_blocks_apart
from cfrbench.machine import computes_bf16
from cfrbench.pipeline import for_prediction
from cfrbench.training import Schedule, sgd
from cfrbench.wording import duration

#: sides of the square matrices, and bytes that are copied
MATRIX, COPIED = 2048, 256 * 2**20
#: crops of the V-Net step: a fifth of the voxels of the paper's, to which the time is scaled
SIDES: Triple = (64, 64, 48)
#: GFLOP of matrix products that take as long as one LoRA step, and one forward pass, of SAM ViT-B on a canvas of 1024:
#: 23 s and 5 s where they run at 189 GFLOP/s (benchmarks/README.md)
VIT_STEP, VIT_FORWARD = 4350.0, 950.0
#: of the 20 test volumes of LA together
TEST_WINDOWS = 1128


def matrix_gflops(dtype: torch.dtype, rounds: int = 5) -> float:
    """GFLOP/s of a product of two square matrices, the best of some rounds."""
    matrix = torch.randn(MATRIX, MATRIX).to(dtype)
    return 2e-9 * MATRIX**3 / min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=rounds))


def copied_gbs(rounds: int = 5) -> float:
    """GB/s of a copy into memory that is there already, bytes read and written counted; the best of some rounds."""
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    return 2e-9 * COPIED / min(timeit.repeat(lambda: target.copy_(source), number=1, repeat=rounds))


def vnet(compute: Compute) -> nn.Module:
    """The paper's V-Net for two classes."""
    segmenter = registry.load("net", "vnet")
    network: nn.Module = compute.place(segmenter(segmenter.Config()).build(1, 2))
    return network


def step_seconds(precision: str, sides: Triple = SIDES, rounds: int = 2) -> float:
    """Seconds of a Mean Teacher step of the paper's V-Net on 2 + 2 crops, the best of some after the first."""
    compute = Compute(torch.device("cpu"), precision)
    method = registry.load("ssl", "mt")(lambda: vnet(compute), 2).train()
    section = TrainingSection()
    optimiser = sgd([p for p in method.parameters() if p.requires_grad], section.lr, section.momentum, 0.0)
    schedule = Schedule(section.steps, lambda step, total: section.lr)
    batch = Batch(compute.batch(torch.randn(4, 1, *sides)), torch.zeros(2, *sides, dtype=torch.uint8))
    steps = itertools.count()

    def step() -> None:
        progress = schedule.progress(next(steps))
        with compute.autocast():
            losses = method.step(batch, progress).losses
        optimiser.zero_grad(set_to_none=True)
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        method.after_update(progress)

    with large_blocks_apart():
        step()
    return min(timeit.repeat(step, number=1, repeat=rounds))


@torch.inference_mode()
def window_seconds(precision: str, sides: Triple, rounds: int = 2) -> float:
    """Seconds of one window of the paper's V-Net, as `predict` computes it."""
    compute = Compute(torch.device("cpu"), precision)
    network = for_prediction(compute, vnet(compute).eval())
    crop = compute.batch(torch.randn(1, 1, *sides))

    def window() -> Tensor:
        with compute.autocast():
            logits: Tensor = network(crop)
        return logits

    return min(timeit.repeat(window, number=1, repeat=rounds + 1)[1:])


# ---------------------------------------------------------------------------------------------------------------------
# what a person sees


def findings() -> Iterator[Finding]:
    """Speeds of this machine's CPU and what the presets will take, one after the other as they are measured."""
    start(ComputeSection(device="cpu"))
    seed_torch(0, "probes")
    single, half = (matrix_gflops(dtype) for dtype in (torch.float32, torch.bfloat16))
    yield Finding(
        "matrix product", True, f"{single:.0f} GFLOP/s in fp32, {half:.0f} in bf16 ({half / single:.1f} times)"
    )
    yield Finding("copy", True, f"{copied_gbs():.0f} GB/s, read and written")
    patch = TrainingSection().patch
    precisions = ("fp32", "bf16") if computes_bf16() else ("fp32", "fp32-fast")
    steps = [step_seconds(precision) for precision in precisions]
    yield Finding(f"V-Net step, 16 filters, 2+2 crops {_by(SIDES)}", True, _both(precisions, steps))
    windows = [window_seconds(precision, patch) for precision in precisions]
    yield Finding(f"V-Net window {_by(patch)}", True, _both(precisions, windows))
    yield preset("smoke")
    yield preset("quick")
    parts = paper_seconds(steps[0] * math.prod(patch) / math.prod(SIDES), windows[0], single)
    words = ", ".join(f"{part} {duration(seconds)}" for part, seconds in parts.items())
    yield Finding("preset paper", True, f"one method, one budget on LA, fp32, this CPU: about "
                                        f"{duration(sum(parts.values()))} by arithmetic ({words})")  # fmt: skip


def preset(name: PresetName) -> Finding:
    """What the default request of a preset takes on the phantom, learned from a chain of it in miniature."""
    with tempfile.TemporaryDirectory(prefix="cfrbench-bench-") as folder:
        planned = sweep.plan(RunConfig(preset=name), Path(folder))
        rates, chains = forecast.Rates(), list(planned.chains.values())
        forecast.probe(rates, chains, None)
        recipes = {stage.key: stage.recipe for chain in chains for stage in chain}
        cost = forecast.forecast(rates, planned.todo, recipes.get, sweep.default_jobs(planned))
        tune = next(stage for stage in planned.todo if stage.stage == "tune")
        kind = forecast.kind_of_work(tune.stage, tune.recipe, recipes.get)[0]
        step = f"; a fine-tuning step {rates.exact[kind].unit_seconds:.2f} s" if kind in rates.exact else ""
        words = forecast.sentence(cost, len(planned.todo))
    return Finding(f"preset {name}", True, f"cfrbench run --preset {name}: {words}{step}")


def paper_seconds(step: float, window: float, gflops: float) -> dict[str, float]:
    """What one method with its CFR twin takes at one budget on LA by the paper's protocol, from what was measured.

    step, window: seconds at the paper's crop. gflops: of matrix products, by which the steps of ViT-B are scaled.
    """
    settings, passes = Settings(), 2
    training, tuning = settings.training, settings.tuning
    return {
        "two trainings": passes * training.steps * step,
        "fine-tuning ViT-B": tuning.steps * tuning.batch_size * VIT_STEP / gflops,
        "labels of every unlabelled crop": training.steps * training.unlabelled_batch * VIT_FORWARD / gflops,
        "prediction": passes * TEST_WINDOWS * window,
    }


def _both(precisions: tuple[str, ...], seconds: list[float]) -> str:
    return ", ".join(f"{taken:.2f} s in {name}" for name, taken in zip(precisions, seconds, strict=True))


def _by(sides: Triple) -> str:
    return "x".join(map(str, sides))
