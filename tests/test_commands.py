"""What commands say to odd and wrong requests: early, once, in words, and never an empty table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import cfrbench
from cfrbench.cli import app, concat, data, evaluate, plugins, predict, report, run  # noqa: F401
from cfrbench.errors import CfrbenchError, StoreError, UsageError, WeightsError

SMALL = {"data.phantom.train": 3, "data.phantom.test": 1, "data.phantom.shape": [24, 24, 12],
         "training.patch": [16, 16, 16]}  # fmt: skip
SETTINGS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def asked(store: Path, *arguments: str) -> Any:
    return call("run", "--preset", "smoke", "--ssl", "supervised", "--store", str(store), *SETTINGS, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "training.patch=[18,16,16]"), "not multiples of 4"),
        (("--device", "cdua"), "compute.device"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--executor", "nobody"), "No executor called 'nobody'"),
        (("--log", "nobody"), "No observer called 'nobody'"),
    ],
)
def test_what_every_stage_would_refuse_is_refused_before_any_runs(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = asked(tmp_path / "store", *arguments)
    assert isinstance(done.exception, UsageError)
    assert words in str(done.exception)
    assert list((tmp_path / "store").rglob("*.json")) == []  # neither a stage nor a record


@pytest.mark.parametrize("arguments", [("--jobs", "0"), ("--jobs", "-2")])
def test_a_number_of_jobs_below_one_is_wrong_use(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert asked(tmp_path, *arguments).exit_code == 2


def test_volumes_that_are_padded_are_told_of_once(tmp_path: Path) -> None:
    done = asked(tmp_path)
    assert done.exit_code == 0, done.output
    assert done.output.count("smaller than the crop") == 1
    larger = call("run", "--preset", "smoke", "--ssl", "supervised", "--store", str(tmp_path), *SETTINGS,
                  "--set", "data.phantom.shape=[24,24,16]")  # fmt: skip
    assert "smaller than the crop" not in larger.output


def test_a_run_of_which_nothing_is_finished_has_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise CfrbenchError("Nothing works today.")

    from cfrbench import stages

    monkeypatch.setattr(stages, "STAGES", dict.fromkeys(stages.STAGES, fail))
    done = asked(tmp_path)
    assert done.exit_code == 1
    assert "Nothing works today." in done.output
    assert "Method" not in done.output
    shown = call("report", "--store", str(tmp_path))
    assert isinstance(shown.exception, StoreError)
    assert "no finished cell" in str(shown.exception)


def test_names_of_runs_are_shown_whole(tmp_path: Path) -> None:
    name = cfrbench.run(ssl=("supervised",), preset="smoke", set=SMALL, store=tmp_path).name
    shown = call("runs", "--store", str(tmp_path)).output
    assert "…" not in shown
    assert name in "".join(line.strip().split(" ")[0] for line in shown.splitlines()[1:])


def test_kinds_and_pictures_have_names_that_fit(tmp_path: Path) -> None:
    assert isinstance(call("plugins", "--kind", "nets").exception, UsageError)
    drawn = call("concat", "show", "--preset", "smoke", *SETTINGS, "-o", str(tmp_path / "canvas.txt"))
    assert isinstance(drawn.exception, UsageError)
    assert ".png" in str(drawn.exception)


def test_scores_of_masks_name_their_unit_and_masks_exclude_weights(tmp_path: Path) -> None:
    import nibabel as nib

    mask = np.zeros((6, 6, 6), dtype=np.uint8)
    mask[2:4, 2:4, 2:4] = 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / "mask.nii.gz")  # type: ignore[attr-defined]
    both = (str(tmp_path / "mask.nii.gz"),) * 2
    assert "ASD (voxel)" in call("evaluate", *both).output
    assert "95HD (mm)" in call("evaluate", *both, "--set", "scoring.unit=mm").output
    refused = call("evaluate", *both, "--checkpoint", "weights.pth")
    assert isinstance(refused.exception, UsageError)
    assert "contradict" in str(refused.exception)


def test_nobody_is_told_how_to_load_an_unknown_file_unsafely(tmp_path: Path) -> None:
    from cfrbench.weights import read_checkpoint

    file = tmp_path / "page.pth"
    file.write_text("<html>404</html>" * 10)
    with pytest.raises(WeightsError, match="not in the format of") as caught:
        read_checkpoint(file)
    assert "weights_only" not in str(caught.value)


def test_facts_of_a_data_set_are_words() -> None:
    shown = call("data", "info", "la").output
    assert "scarce 1, moderate 16" in shown
    assert "{" not in shown
