"""A run as an archive: equal bytes, equal numbers elsewhere, and no edit that goes unnoticed or does harm."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import cfrbench
from cfrbench.archive.form import MANIFEST, SCORES, SUMMARY, Manifest, seal_of
from cfrbench.archive.verifying import Verdict, verify
from cfrbench.archive.writing import export_run
from cfrbench.cli import app, share  # noqa: F401
from cfrbench.errors import DataError, UsageError

SMALL = {"data.phantom.train": 3, "data.phantom.test": 2, "data.phantom.shape": (32, 32, 16)}
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one finished run: MT, its twin, pseudo-labels."""
    folder = tmp_path_factory.mktemp("store")
    result = cfrbench.run(ssl=("mt",), labels=(1,), preset="smoke", set=SMALL, store=folder, bounds=False)
    assert result.failures == {}
    return folder


@pytest.fixture(scope="module")
def archive(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its archive, without truth."""
    return export_run("latest", store, tmp_path_factory.mktemp("archive") / "run.zip").path


def unpacked(path: Path) -> Files:
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def packed(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, payload in files.items():
            opened.writestr(name, payload)
    return path


def sealed(files: Files, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Files:
    """What a careful forger does: checksums and seal made to fit."""
    values = json.loads(files[MANIFEST])
    change(values)
    values["files"] = {name: {"sha256": hashlib.sha256(payload).hexdigest(), "bytes": len(payload)}
                       for name, payload in files.items() if name != MANIFEST}  # fmt: skip
    values["seal"] = seal_of(Manifest.model_validate(values))
    return files | {MANIFEST: json.dumps(values).encode()}


def flipped(files: Files) -> tuple[str, Files]:
    """One voxel of the CFR twin's first test case changed."""
    name = next(name for name in files if "mt-cfr" in name)
    volume = bytearray(gzip.decompress(files[name]))
    volume[-1] ^= 1
    return name, files | {name: gzip.compress(bytes(volume), mtime=0)}


def edited(files: Files) -> Files:
    """The first Dice of scores.csv, one point higher."""
    head, first, *rest = files[SCORES].decode().splitlines()
    cells = first.split(",")
    place = head.split(",").index("dice")
    cells[place] = repr(float(cells[place]) + 1)
    return files | {SCORES: "\n".join([head, ",".join(cells), *rest, ""]).encode()}


def test_an_archive_verifies_elsewhere_from_nothing_but_itself(archive: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.zip"
    moved.write_bytes(archive.read_bytes())
    done = CliRunner().invoke(app, ["verify", str(moved), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["findings"] == []
    assert answer["predictions"] == 2 + 2 + 2  # two cells of two test cases, two pseudo-labelled cases
    assert answer["numbers"] == 6 * 4 + 3 * 4  # four metrics of each label map, four means of each row


def test_equal_runs_give_equal_bytes(archive: Path, store: Path, tmp_path: Path) -> None:
    again = export_run("latest", store, tmp_path / "again.zip")
    assert again.path.read_bytes() == archive.read_bytes()
    assert again.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert not list(tmp_path.glob(".*"))


def test_the_archive_tells_no_place_and_its_request_runs_again(archive: Path, store: Path, tmp_path: Path) -> None:
    files = unpacked(archive)
    assert not [name for name, payload in files.items() if str(store).encode() in payload]
    request = tmp_path / "run.toml"
    request.write_bytes(files["run.toml"])
    again = cfrbench.run(cfrbench.sweep.read_config(str(request), store), store=store)
    assert again.trained == 0


@pytest.mark.parametrize("forged", [False, True])
def test_one_flipped_voxel_is_found_and_named(archive: Path, tmp_path: Path, forged: bool) -> None:
    name, files = flipped(unpacked(archive))
    before = json.loads(files[MANIFEST])["files"][name]["sha256"]
    verdict = verify(packed(tmp_path / "flipped.zip", sealed(files) if forged else files))
    case = Path(name).name.removesuffix(".nii.gz")
    assert {finding.case for finding in verdict.findings if finding.file == SCORES} == {case}
    if not forged:
        [checksum] = [finding for finding in verdict.findings if finding.file == name]
        assert (checksum.case, checksum.expected) == (case, before)
        assert checksum.found == hashlib.sha256(files[name]).hexdigest()


@pytest.mark.parametrize("forged", [False, True])
def test_one_edited_score_is_found_and_named(archive: Path, tmp_path: Path, forged: bool) -> None:
    files = edited(unpacked(archive))
    verdict = verify(packed(tmp_path / "edited.zip", sealed(files) if forged else files))
    [score] = [finding for finding in verdict.findings if finding.what.startswith("dice of")]
    assert (score.file, score.case) == (SCORES, "test-00")
    assert float(score.expected) == pytest.approx(float(score.found) + 1)
    assert len(verdict.findings) == (1 if forged else 2)  # the file's checksum too


def test_edited_means_rows_and_contents_are_named(archive: Path, tmp_path: Path) -> None:
    files = unpacked(archive)
    means = json.loads(files[SUMMARY])
    means[0]["hd95_voxel"] += 1
    lines = files[SCORES].decode().splitlines()
    files |= {SUMMARY: json.dumps(means).encode(), SCORES: "\n".join([*lines[:-1], ""]).encode(), "more.txt": b"more"}
    del files["run.toml"]
    found = "\n".join(map(str, verify(packed(tmp_path / "edited.zip", files)).findings))
    for words in ("hd95_voxel of mt", "more.txt", "run.toml: missing", "train-02: the score of", "summary.json"):
        assert words in found
    loosened = unpacked(archive)
    loosened[MANIFEST] = loosened[MANIFEST].replace(b'"empty": "penalty"', b'"empty": "paper"')
    assert "seal" in str(verify(packed(tmp_path / "loosened.zip", loosened)).findings[0])
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "edited.zip")])
    assert done.exit_code == 1
    assert "differs: run.toml" in done.stdout


def test_truth_comes_from_the_archive_or_is_asked_for(archive: Path, store: Path, tmp_path: Path) -> None:
    def patients(values: dict[str, Any]) -> None:
        values["data"]["synthetic"] = False

    with pytest.raises(DataError, match="--data-root"):
        verify(packed(tmp_path / "without.zip", sealed(unpacked(archive), patients)))
    whole = export_run("latest", store, tmp_path / "whole.zip", with_truth=True).path
    verdict = verify(packed(tmp_path / "with.zip", sealed(unpacked(whole), patients)))
    assert (verdict.findings, verdict.truth, verdict.numbers) == ([], "from the archive", 36)
    assert verify(whole).truth == "drawn again from its seed"


def test_another_truth_is_named_and_not_scored(archive: Path, tmp_path: Path) -> None:
    def other_patients(values: dict[str, Any]) -> None:
        values["data"]["options"]["seed"] = 7

    verdict = verify(packed(tmp_path / "other.zip", sealed(unpacked(archive), other_patients)))
    assert verdict.numbers == 0
    assert {finding.case for finding in verdict.findings if "truth" in finding.what} == \
        {"test-00", "test-01", "train-01", "train-02"}  # fmt: skip


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../b", "a\\b", "C:/x", "a//b", "folder/", link("link")])
def test_entries_that_lead_out_are_refused(archive: Path, tmp_path: Path, name: Any) -> None:
    path = packed(tmp_path / "bad.zip", unpacked(archive))
    with zipfile.ZipFile(path, "a") as opened:
        opened.writestr(name, b"/etc/passwd")
    with pytest.raises(DataError, match="no plain file inside"):
        verify(path)


def test_bombs_and_greedy_requests_are_refused(archive: Path, tmp_path: Path) -> None:
    files = unpacked(archive)
    bomb = packed(tmp_path / "bomb.zip", files | {"zeros": bytes(2**24)})
    with pytest.raises(DataError, match="above the limit"):
        verify(bomb, limit_gib=0.01)
    name = next(name for name in files if name.endswith(".nii.gz"))
    header = bytearray(gzip.decompress(files[name])[:352])
    header[42:48] = (32767).to_bytes(2, "little") * 3  # dim[1..3]
    liar = verify(packed(tmp_path / "liar.zip", files | {name: gzip.compress(bytes(header))}))
    assert [f.file for f in liar.findings if "announces" in f.found] == [name]

    def greedy(values: dict[str, Any]) -> None:
        values["data"]["options"]["shape"] = [100_000, 100_000, 100_000]

    with pytest.raises(DataError, match="Do not trust"):
        verify(packed(tmp_path / "greedy.zip", sealed(files, greedy)))

    def escape(values: dict[str, Any]) -> None:
        values["cells"][0]["name"] = "../../home"

    with pytest.raises(DataError, match="damaged"):
        verify(packed(tmp_path / "escape.zip", sealed(files, escape)))


def test_damaged_archives_are_refused_in_one_paragraph(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    for name, payload in {"cut": whole[: len(whole) // 2], "text": b"no archive", "empty": b""}.items():
        path = tmp_path / name
        path.write_bytes(payload)
        done = CliRunner().invoke(app, ["verify", str(path)])
        assert isinstance(done.exception, DataError)
        assert "\n" not in str(done.exception)
        assert str(path) in str(done.exception)
    for contents in ({}, {MANIFEST: b"{"}, {MANIFEST: b'{"format": 99}'}, {MANIFEST: b'{"format": 1}'}):
        with pytest.raises(DataError):
            verify(packed(tmp_path / "hollow.zip", contents))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_escapes_as_anything_but_a_finding_or_a_refusal(
    archive: Path, tmp_path: Path, place: float, bit: int
) -> None:
    payload = bytearray(archive.read_bytes())
    payload[int(place * len(payload))] ^= 1 << bit
    path = tmp_path / "flipped.zip"
    path.write_bytes(payload)
    with contextlib.suppress(DataError):
        assert isinstance(verify(path), Verdict)


def test_a_half_finished_run_is_not_exported(store: Path, tmp_path: Path) -> None:
    record = json.loads(next((store / "runs").glob("*.json")).read_text())
    record["cells"][0]["score"] = "0" * 64
    record |= {"name": "half", "hash": "half", "written": "2000-01-01T00:00:00+00:00"}
    half = store / "runs" / "half.json"
    half.write_text(json.dumps(record))
    try:
        with pytest.raises(UsageError, match="half finished: 1 of 3 cells"):
            export_run("half", store, tmp_path / "half.zip")
    finally:
        half.unlink()
    assert list(tmp_path.iterdir()) == []
