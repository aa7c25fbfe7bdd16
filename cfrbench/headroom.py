"""When memory runs out: what to lower, and by how much.

The shares were measured with `benchmarks/vit_step.py` (SAM ViT-B, LoRA, batch 1): what a step holds beyond weights and
libraries grows with the batch and with the square of the input's side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cfrbench.config import Settings
from cfrbench.errors import CfrbenchError

#: shares of a step's own memory that are left in half precision and with recomputed blocks
HALF_PRECISION, RECOMPUTED = 0.6, 0.6
#: what allocators say; on a CPU it is a RuntimeError without a class of its own
SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")


@contextmanager
def memory_advice(advice: Callable[[], str]) -> Iterator[None]:
    """Turn a failed allocation of the block into a CfrbenchError that ends in ``advice``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter
        words = str(error).partition("\n")[0]
        failed = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(s in words.lower() for s in SIGNS)
        if not failed:
            raise
        raise CfrbenchError(f"Memory ran out ({words or type(error).__name__}). {advice()}") from error


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


def _share(share: float) -> str:
    return f"about {share:.0%}"
