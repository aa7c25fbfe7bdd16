"""What a process holds after steps that free everything; each case in a process of its own, as settings last."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer"
)

PREFIX = """
import ctypes, json, sys
from cfrbench import heap

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Mallinfo2

def now():
    found = library.mallinfo2()
    return {name: getattr(found, name) for name, _ in found._fields_}

def settle(keep):
    heap._AMPLE = 0  # however small this machine is
    if keep:
        heap.keep_freed_memory()
"""
BLOCK = 8 * 2**20


def told(code: str) -> Any:
    """What a program in a process of its own prints."""
    own = ("MALLOC_", "GLIBC_", "LD_PRELOAD", "THP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    done = subprocess.run([sys.executable, "-c", PREFIX + code], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[1], env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TWICE = f"""
settle(keep=%s)
import torch
states = [now()]
for _ in range(2):
    with heap.large_blocks_apart():
        block = torch.empty({BLOCK}, dtype=torch.uint8)
        states.append(now())
    del block
    block = torch.empty({BLOCK}, dtype=torch.uint8)
    states.append(now())
    del block
print(json.dumps(states))
"""


def test_large_blocks_of_a_first_step_come_from_the_system_and_later_ones_from_the_heap() -> None:
    before, inside, after, *_ = told(TWICE % True)
    assert inside["hblkhd"] - before["hblkhd"] >= BLOCK
    assert after["hblkhd"] == before["hblkhd"]
    assert after["uordblks"] - before["uordblks"] >= BLOCK


def test_small_blocks_are_ready_afterwards_and_made_once() -> None:
    before, _, first, _, second = told(TWICE % True)
    assert first["ordblks"] - before["ordblks"] > 1000
    assert abs(second["ordblks"] - first["ordblks"]) < 200
    assert abs(second["uordblks"] - first["uordblks"]) < 2**20


def test_nothing_changes_in_a_process_that_did_not_ask() -> None:
    before, inside, after, *_ = told(TWICE % False)
    assert after["ordblks"] - before["ordblks"] < 500
    assert after["arena"] - before["arena"] < 2**25  # an asked one grows by 64 MiB at a time
    assert inside["hblkhd"] >= BLOCK  # by glibc's own threshold


STEPS = """
settle(keep=True)
import contextlib, torch

stays = []

def step(first):
    blocks = []
    for size in (16, 16, 24, 16, 24, 16, 16, 24):
        blocks.append(torch.empty(size * 2**20, dtype=torch.uint8).fill_(1))
        if first:
            stays.extend(torch.empty(64 * n) for n in range(1, 16))
    gradients = []
    while blocks:
        gradients.append(torch.empty_like(blocks[-1]).fill_(1))
        blocks.pop()
        del gradients[:-2]

before = now()["arena"]
apart = heap.large_blocks_apart if %s else contextlib.nullcontext
with apart():
    step(first=True)
for _ in range(8):
    step(first=False)
print(json.dumps((now()["arena"] - before) / 2**20))
"""


def test_steps_that_free_everything_need_no_more_than_one_of_them() -> None:
    """A step holds 152 MiB of blocks, and up to two more on its way back."""
    plain, apart = told(STEPS % False), told(STEPS % True)
    assert apart < 152 + 2 * 24 + 64  # glibc takes 64 MiB at a time
    assert plain > 1.1 * apart
