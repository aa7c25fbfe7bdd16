"""How a program's memory is held on glibc: what is freed stays with the process, and is not cut to pieces there.

Fresh pages cost more than the arithmetic on them, so freed blocks are kept for the next ones. That alone wastes memory:
torch asks for aligned blocks, glibc cuts them out of larger ones, and once something small has settled in the cuttings
the next block of the same size no longer fits. So what is small and stays is given other places (`large_blocks_apart`).
No number changes. All of it is for programs, not for libraries: the settings are those of the whole process.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock

#: glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
#: only blocks above the last threshold that this glibc takes come from the system and go back to it; old ones take no
#: more than 32 MiB
_KEPT = ((_MMAP_THRESHOLD, 2**25), (_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**26))
#: blocks of 1 MiB or more come from the system unless the heap has room, and the heap grows by little
_APART = ((_MMAP_THRESHOLD, 2**20), (_TOP_PAD, 2**17))
#: small blocks that are held ready: what to ask for to get each of glibc's sizes up to 1 KiB; how many of each
_SMALL, _READY = range(24, 1040, 16), 64
#: bytes of memory below which nothing is kept
_AMPLE = 2**33

_keeps = False
_between: list[int] = []  # addresses of what keeps free small blocks from growing together
_one_at_a_time = Lock()


def keep_freed_memory() -> None:
    """Let this process reuse freed memory instead of giving it back, on machines with 8 GiB or more and with glibc.

    Blocks above 1 GiB still go back at once (above 32 MiB where glibc is older than 2.35).
    """
    global _keeps
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < _AMPLE:
        return
    with suppress(OSError, AttributeError):
        _set(_KEPT)
        _keeps = True


def give_freed_memory_back() -> None:
    """Give what this process has freed back to the system."""
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Run the first of many equal steps: new large blocks come from the system, and leave the heap to what is small.

    A first step leaves many small blocks behind (compiled kernels, states of optimisers). Between large ones they would
    cut the heap up for good: a Mean Teacher step then took 5.0 to 5.4 GiB instead of 3.2 (V-Net of 16 filters, crops of
    112 x 112 x 80, bf16). For the small blocks of later steps free ones of every size are left ready, about 4 MiB.
    Nothing happens without `keep_freed_memory`, or where another thread is in such a step already.
    """
    if not _keeps or not _one_at_a_time.acquire(blocking=False):
        yield
        return
    try:
        give_freed_memory_back()
        _set(_APART)
        yield
        _make_ready()
    finally:
        _set(_KEPT)
        _one_at_a_time.release()


def _set(options: Sequence[tuple[int, int]]) -> None:
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in options:
        mallopt(option, value)  # 0 if it is refused


def _make_ready() -> None:
    """Leave free blocks of every small size, each between two that are taken until the next call."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    while _between:
        library.free(_between.pop())
    for size in _SMALL:
        blocks = [library.malloc(size) for _ in range(2 * _READY)]
        _between.extend(blocks[1::2])
        for address in blocks[::2]:
            library.free(address)
