"""How many stages fit side by side: on the GPUs, cores and memory of this machine, by what such stages took before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from cfrbench.compute import find_device, free_gpu_mib, gpus
from cfrbench.contracts import StageTask
from cfrbench.forecast import ANOTHER, Lookup, Rates
from cfrbench.machine import available_mib, room_for_jobs

#: share of what is free that is left so: stages of a kind differ a little, and others may come
MARGIN = 0.1
#: what is reckoned for a process on a GPU beside its tensors (CUDA's context and kernels)
CONTEXT_MIB = 600.0
MIB = 1024.0


def side_by_side(
    peaks_mib: Iterable[float], room_mib: float, *, beside_mib: float = 0.0, margin: float = MARGIN
) -> int:
    """How many stages of these ``peaks_mib`` run at a time in ``room_mib``, whichever meet; at least 1.

    The largest are taken to meet. ``beside_mib``: what each process takes beside its peak. margin: the share
    of the room that is left free.
    """
    needs = accumulate(peak + beside_mib for peak in sorted(peaks_mib, reverse=True))
    return max(1, sum(need <= room_mib * (1 - margin) for need in needs))


def jobs_here(
    todo: Sequence[StageTask], recipes: Lookup, rates: Rates, *, device: str, threads: int, unknown_gib: float
) -> int:
    """How many of the stages ``todo`` to run at a time on ``device`` with ``threads`` each.

    ``unknown_gib``: memory, and GPU memory, of a stage of a kind that ``rates`` know nothing of.
    """
    place = find_device(device)
    if place.type not in ("cpu", "cuda"):
        return 1
    costs = [rates.cost(task, recipes) for task in todo]
    # What another method took says too little: some hold twice as many networks.
    known = [None if cost is None or cost.like == ANOTHER else cost for cost in costs]
    unknown_mib = unknown_gib * MIB
    peaks = [cost.peak_mib if cost else unknown_mib for cost in known]
    jobs = min(len(todo), room_for_jobs(threads), side_by_side(peaks, available_mib()))
    if place.type == "cpu":
        return jobs
    chosen = gpus() if place.index is None else [place.index]
    peaks = [unknown_mib if cost is None or cost.gpu_mib is None else cost.gpu_mib for cost in known]
    each = side_by_side(peaks, min(map(free_gpu_mib, chosen)), beside_mib=CONTEXT_MIB)
    return min(jobs, each * len(chosen))
