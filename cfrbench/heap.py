"""How a program's memory is held on glibc: what is freed stays with the process, and is not cut to pieces there.

Fresh pages cost more than the arithmetic on them, so freed blocks are kept for the next ones. That alone wastes memory:
torch asks for aligned blocks, glibc cuts them out of larger ones, and once something small has settled in the cuttings
the next block of the same size no longer fits. So what is small and stays is given other places (`large_blocks_apart`).
No number changes. All of it is for programs, not for libraries.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
#: blocks of up to 1 GiB come from the heap, and nothing goes back by itself
_KEPT = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**26}
#: what the heap has no room for comes from the system if it has 1 MiB or more, and the heap grows by little
_APART = {_MMAP_THRESHOLD: 2**20, _TOP_PAD: 2**17}
#: bytes of the small blocks that are held ready, one size for each of glibc's; how many of each
_SMALL, _READY = range(24, 1040, 16), 64

_keeps = False
_between: list[int] = []  # addresses of what keeps free small blocks from growing together


def keep_freed_memory() -> None:
    """Let this process reuse freed memory instead of giving it back, where memory is ample and the C library glibc."""
    global _keeps
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 2**33:
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
    """Run the first of many equal steps: large blocks come from the system, and leave the heap to what is small.

    A first step leaves many small blocks behind (compiled kernels, states of optimisers). Between large ones they would
    cut the heap up for good: steps of a V-Net then took 5.0 GiB instead of 3.2 (benchmarks/README.md). For those of
    later steps free blocks of every small size are left ready, about 4 MiB. Only after `keep_freed_memory`.
    """
    if not _keeps:
        yield
        return
    give_freed_memory_back()
    _set(_APART)
    try:
        yield
    finally:
        _make_ready()
        _set(_KEPT)


def _set(options: dict[int, int]) -> None:
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in options.items():
        mallopt(option, value)


def _make_ready() -> None:
    """Leave free blocks of every small size, each between two that are taken until the next call."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    for address in _between:
        library.free(address)
    _between.clear()
    for size in _SMALL:
        blocks = [library.malloc(size) for _ in range(2 * _READY)]
        _between.extend(blocks[1::2])
        for address in blocks[::2]:
            library.free(address)
