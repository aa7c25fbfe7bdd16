"""When memory runs out: the way that needs less and gives the same numbers, or what to lower, and by how much.

The shares were measured with `benchmarks/vit_step.py` (SAM ViT-B, LoRA, batch 1): what a step holds beyond weights and
libraries grows with the batch and with the square of the input's side.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from cfrbench.config import Settings
from cfrbench.errors import OutOfMemory
from cfrbench.machine import give_memory_back

Way = TypeVar("Way")
Result = TypeVar("Result")

#: shares of a step's own memory that are left in half precision and with recomputed blocks
HALF_PRECISION, RECOMPUTED = 0.6, 0.6
#: what allocators say; on a CPU it is a RuntimeError without a class of its own
SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")


@contextmanager
def memory_advice(advice: Callable[[], str]) -> Iterator[None]:
    """Turn a failed allocation of the block into OutOfMemory that ends in ``advice``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter
        words = str(error).partition("\n")[0]
        failed = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(s in words.lower() for s in SIGNS)
        if not failed:
            raise
        raise OutOfMemory(f"Memory ran out ({words or type(error).__name__}). {advice()}") from error


def lean_if_needed(
    attempt: Callable[[Way], Result], usual: Way, lean: Way | None, on_retry: Callable[[str], None]
) -> Result:
    """``attempt(usual)``; should memory run out, ``attempt(lean)``, if there is such a way to the same numbers.

    ``on_retry`` is told what was short before the second attempt. OutOfMemory if that fails too.
    """
    try:
        return attempt(usual)
    except OutOfMemory as error:
        if lean is None:
            raise
        reason = str(error)
    # Only out here the error is gone, and with it its frames, which held the tensors of the first attempt.
    gc.collect()
    give_memory_back()
    on_retry(reason)
    return attempt(lean)


def tuning_advice(settings: Settings, model_name: str, options: Any) -> str:
    """What lowers the memory of a fine-tuning step; ``options`` are those of the foundation model."""
    batch, side = settings.tuning.batch_size, getattr(options, "input_size", 0)
    ways = []
    if batch > 1:
        accumulated = batch * settings.tuning.accumulate
        ways.append(f"--set tuning.batch_size=1 --set tuning.accumulate={accumulated} (the same gradient, "
                    f"{_share(1 / batch)} of the memory of a step)")  # fmt: skip
    if getattr(options, "recompute", None) is False:
        ways.append(
            f"--set model.{model_name}.recompute=true (the same numbers, {_share(RECOMPUTED)}, half as much time again)"
        )
    if settings.compute.precision not in ("bf16", "fp16"):
        ways.append(f"--precision bf16 ({_share(HALF_PRECISION)}, rounded numbers)")
    if side >= 128:
        ways.append(f"--set model.{model_name}.input_size={side // 2} ({_share(0.25)}, coarser)")
    words = "; ".join(ways) or "a smaller foundation model"
    return f"Lower the need of a fine-tuning step, in this order: {words}. Finished steps are kept."


def labelling_advice(settings: Settings, model_name: str, options: Any) -> str:
    """What lowers the memory of labelling with a foundation model."""
    side = getattr(options, "input_size", 0)
    half = "" if settings.compute.precision in ("bf16", "fp16") else f"--precision bf16 ({_share(HALF_PRECISION)}); "
    return (f"Lower the need of labelling: {half}--set model.{model_name}.input_size={side // 2} ({_share(0.25)}). "
            "What is labelled is kept.")  # fmt: skip


def training_advice(settings: Settings) -> str:
    """What helps where a training step finds too little memory; nothing lowers its need without changing numbers."""
    section = settings.training
    half = "" if settings.compute.precision in ("bf16", "fp16") else "--precision bf16 (rounded numbers); "
    smaller = [f"--set training.{name}={size // 2}" for name in ("labelled_batch", "unlabelled_batch")
               if (size := getattr(section, name)) > 1]  # fmt: skip
    batches = f"{' '.join(smaller)} (half the batch, another training); " * bool(smaller)
    return (f"Let less run beside it (the same numbers), or lower the need of a training step: {half}{batches}"
            f"a smaller training.patch than {list(section.patch)}. Finished steps are kept.")  # fmt: skip


def prediction_advice(settings: Settings) -> str:
    """What helps where sliding a network over a volume finds too little memory: windows go through it one by one."""
    half = "" if settings.compute.precision in ("bf16", "fp16") else ", or train and predict with --precision bf16"
    return f"Let less run beside this prediction (the same numbers){half}."


def _share(share: float) -> str:
    return f"about {share:.0%}"
