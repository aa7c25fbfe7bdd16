"""What is written comes back, with equal bytes for equal content; what is damaged is named."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfrbench import formats
from cfrbench.errors import StoreError
from cfrbench.files import JsonLog, plain, read_log


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4)), max_size=4), st.integers(2, 255))
def test_labels_come_back_and_equal_labels_give_equal_bytes(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, int]], classes: int
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    labels = {f"case/{i} é": torch.randint(0, classes, shape, dtype=torch.uint8) for i, shape in enumerate(shapes)}
    formats.write_labels(folder / "a.npz", labels)
    strided = {case: label.permute(2, 1, 0).contiguous().permute(2, 1, 0) for case, label in labels.items()}
    formats.write_labels(folder / "b.npz", strided)
    read = formats.read_labels(folder / "a.npz")
    assert list(read) == list(labels)
    assert all(torch.equal(read[case], labels[case]) and read[case].dtype == torch.uint8 for case in labels)
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()


def test_eight_left_atria_are_small_and_quick(tmp_path: Path) -> None:
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (190, 140, 88)), indexing="ij"))
    ball = (grid.square().sum(0) + 0.05 * (17 * grid).sin().sum(0) < 0.2).to(torch.uint8)
    began = time.process_time()
    formats.write_labels(tmp_path / "labels.npz", {f"case{i}": ball for i in range(8)})
    assert time.process_time() - began < 0.3
    assert (tmp_path / "labels.npz").stat().st_size < 0.02 * 8 * ball.numel()


def test_labels_of_another_kind_are_refused(tmp_path: Path) -> None:
    for wrong in (torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(StoreError, match="case7"):
            formats.write_labels(tmp_path / "labels.npz", {"case7": wrong})


def test_tensors_and_tables_come_back_with_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4).T, "a": torch.arange(5, dtype=torch.uint8)}
    about = {"classes": 2, "names": ["x", "y"], "rank": 4, "model": "tiny"}
    table = pd.DataFrame({"case": ["a", "b"], "value": [1.5, None], "count": [1, 2]})
    for name in ("1", "2"):
        formats.write_tensors(tmp_path / f"{name}.safetensors", tensors, about)
        formats.write_table(tmp_path / f"{name}.parquet", table)
    read = formats.read_tensors(tmp_path / "1.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert formats.read_metadata(tmp_path / "1.safetensors") == about
    pd.testing.assert_frame_equal(formats.read_table(tmp_path / "1.parquet"), table)
    for kind in ("safetensors", "parquet"):
        assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"2.{kind}").read_bytes()


@pytest.mark.parametrize(
    "reader", [formats.read_tensors, formats.read_metadata, formats.read_table, formats.read_labels]
)
def test_damaged_and_missing_files_are_named(tmp_path: Path, reader: Callable[[Path], Any]) -> None:
    for data in (b"", b"\x00" * 100, b"PK\x03\x04 not really a zip", b"PAR1 not really PAR1"):
        (tmp_path / "bad.bin").write_bytes(data)
        with pytest.raises(StoreError, match=r"bad\.bin"):
            reader(tmp_path / "bad.bin")
    with pytest.raises(StoreError, match=r"absent\.bin"):
        reader(tmp_path / "absent.bin")


def test_a_log_torn_by_a_kill_goes_on_and_is_read(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []
    log = JsonLog(tmp_path / "log.jsonl")
    log.write("step", step=1, loss=torch.tensor(0.5), values={"a": float("nan")})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert [event["step"] for event in read_log(tmp_path / "log.jsonl")] == [1]
    log = JsonLog(tmp_path / "log.jsonl")
    log.write("step", step=2)
    log.close()
    events = read_log(tmp_path / "log.jsonl")
    assert [event["step"] for event in events] == [1, 2]
    assert (events[0]["loss"], events[0]["values"]) == (0.5, {"a": None})


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        plain({"a": [object()]})
