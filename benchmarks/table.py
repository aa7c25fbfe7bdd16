"""Writes what the benchmarks measured into ``benchmarks/README.md``: ``python -m benchmarks.table MEASURED.json``.

The file is what ``pytest benchmarks --measured MEASURED.json`` left; a partial run renews the rows of its tests alone.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch

from cfrbench.compute import start
from cfrbench.config import ComputeSection
from cfrbench.files import write_atomic
from cfrbench.machine import environment
from cfrbench.probes import copied_gbs, matrix_gflops

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- measured: begin (make bench writes up to the end mark) -->", "<!-- measured: end -->"


def table(rows: dict[str, dict[str, object]]) -> str:
    """A Markdown table of what was measured, in the order of files and tests."""
    lines = ["| what | measured | bounds | file |", "|---|---|---|---|"]
    for name in sorted(rows):
        file, outcome = name.partition("::")[0], "met" if rows[name]["passed"] else "missed"
        figures = rows[name]["figures"]
        assert isinstance(figures, dict)
        lines += [f"| {_cell(what)} | {_cell(value)} | {outcome} | `{file}` |" for what, value in figures.items()]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def machine() -> str:
    """One sentence on what computed the figures, its own limits measured now."""
    threads = ComputeSection().threads
    start(ComputeSection(device="cpu"))
    here = environment()
    return (f"{here['cpu']}, {here['cores']} cores, {here['platform']}, torch {here['torch']}, Python "
            f"{platform.python_version()}. Limits with {threads} threads, measured with the table: matrix product "
            f"{matrix_gflops(torch.float32):.0f} GFLOP/s in fp32 and {matrix_gflops(torch.bfloat16):.0f} in bf16, copy "
            f"{copied_gbs():.0f} GB/s read and written.")  # fmt: skip


def written(readme: str, text: str) -> str:
    """The README with ``text`` between its marks."""
    head, found, rest = readme.partition(BEGIN)
    _, also, tail = rest.partition(END)
    if not found or not also:
        raise SystemExit(f"{README} lacks the lines '{BEGIN}' and '{END}'.")
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = f"{machine()}\n\n{table(measured)}"
    write_atomic(README, written(README.read_text(encoding="utf-8"), text).encode())
