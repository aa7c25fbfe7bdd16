"""Cross-validation and repeated choices of labelled cases: what the lists keep, and what a table says of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cfrbench
from cfrbench.errors import ConfigError, UsageError
from cfrbench.prepared.folds import folds, with_labels_of
from cfrbench.report import tables, writers
from cfrbench.volume import Split

PHANTOM = {"data.phantom.train": 4, "data.phantom.test": 2, "data.phantom.shape": (16, 16, 16)}


@st.composite
def sets(draw: st.DrawFn) -> tuple[Split, dict[str, str], frozenset[str]]:
    """A split of up to 30 cases of several patients, some training cases without a label."""
    count = draw(st.integers(6, 30))
    names = [f"case{number}" for number in range(count)]
    patients = {name: f"p{draw(st.integers(0, count))}" for name in names}
    test = draw(st.integers(1, count // 3))
    bare = draw(st.sets(st.sampled_from(names[: count - test]), max_size=count // 3))
    return Split(tuple(names[: count - test]), tuple(names[count - test :])), patients, frozenset(bare)


@given(sets(), st.integers(2, 5), st.integers(0, 9))
def test_laws_of_folds(drawn: tuple[Split, dict[str, str], frozenset[str]], count: int, seed: int) -> None:
    split, patients, bare = drawn
    everything = {*split.train, *split.test}
    if len({patients[case] for case in everything - bare}) < count:
        with pytest.raises(ConfigError, match="--folds"):
            folds(split, patients, bare, count, seed)
        return
    try:
        made = folds(split, patients, bare, count, seed)
    except cfrbench.errors.DataError:  # one patient has every other case: nothing is left to train on
        return
    tested = [case for fold in made for case in fold.test]
    assert sorted(tested) == sorted(everything - bare)  # each labelled case once
    for fold in made:
        held = {patients[case] for case in fold.test}
        assert not held & {patients[case] for case in fold.train}
        order = [split.train + split.test].pop()
        known = [case for case in fold.train if case not in bare]
        assert list(fold.train[: len(known)]) == known == sorted(known, key=order.index)
    assert len({len(fold.train) for fold in made}) == 1
    assert made == folds(split, patients, bare, count, seed)


def test_time_points_of_a_patient_stay_together_where_nothing_is_known_but_names() -> None:
    names = tuple(f"patient{n:03d}_frame{f:02d}" for n in range(6) for f in (1, 12))
    for fold in folds(Split(names[:8], names[8:]), {}, (), 3, 0):
        assert not {name[:10] for name in fold.train} & {name[:10] for name in fold.test}


@given(sets(), st.integers(0, 9))
def test_laws_of_choices(drawn: tuple[Split, dict[str, str], frozenset[str]], seed: int) -> None:
    split, _, bare = drawn
    chosen = with_labels_of(split, bare, seed)
    assert (sorted(chosen.train), chosen.test) == (sorted(split.train), split.test)
    known = len(set(split.train) - bare)
    assert not bare & set(chosen.train[:known])
    assert chosen == with_labels_of(split, bare, seed)


def test_choices_differ() -> None:
    split = Split(tuple(map(str, range(20))), ("test",))
    assert len({with_labels_of(split, (), seed).train[0] for seed in range(10)}) > 4


def test_the_hash_is_that_of_the_lists() -> None:
    first, other = Split(("a", "b"), ("c",)), Split(("b", "a"), ("c",))
    assert first.sha256 == Split(("a", "b"), ("c",), note="said otherwise").sha256
    assert len({first.sha256, other.sha256, Split(("a",), ("c",), ("b",)).sha256}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# a run


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> cfrbench.Result:
    """Two folds with two choices each."""
    return cfrbench.run(labels=(1,), preset="smoke", set=PHANTOM, folds=2, label_seeds=(0, 1),
                        store=tmp_path_factory.mktemp("store"))  # fmt: skip


def test_every_row_says_its_lists(repeated: cfrbench.Result) -> None:
    assert repeated.failures == {}
    rows = repeated.cases
    assert set(rows["fold"]) == {"1/2", "2/2"}
    by_list = rows[rows["variant"] == "cfr"].groupby(["fold", "choice"])["split"].unique()
    assert {len(hashes) for hashes in by_list} == {1}
    known = {(s["fold"], s["choice"]): s["sha256"][:12] for s in repeated.facts["splits"]}
    assert {key: hashes[0] for key, hashes in by_list.items()} == known
    assert all(len(split["labelled"]["1"]) == 1 for split in repeated.as_json()["splits"])


def test_every_case_is_tested_once_a_choice(repeated: cfrbench.Result) -> None:
    tested = repeated.cases[(repeated.cases["variant"] == "cfr") & (repeated.cases["metric"] == "dice")]
    assert set(tested.groupby("case").size()) == {2}
    assert tested["case"].nunique() == 6


def test_one_upper_bound_serves_all_choices_of_a_fold(repeated: cfrbench.Result) -> None:
    most = repeated.facts["labelled_cases"]
    bound = repeated.cases[(repeated.cases["ssl"] == "supervised") & (repeated.cases["labels"] == most)]
    assert set(bound["choice"]) == {""}
    assert bound[bound["metric"] == "dice"].groupby("case").size().eq(1).all()


def test_rows_count_alike_and_the_table_shows_spreads(repeated: cfrbench.Result) -> None:
    table = repeated.table()
    assert len(table[table["variant"] == "cfr"]) == 1
    text = writers.to_markdown(tables.comparison(repeated.cases, repeated.facts))
    for words in ("± choices", "± folds", "Labelled with 1 label: fold 1/2 choice 0", "cross-validation in 2 folds"):
        assert words in text


def test_the_official_run_is_named_and_keyed_as_before(tmp_path: Path) -> None:
    plain = cfrbench.sweep.plan(cfrbench.RunConfig(preset="smoke", set=PHANTOM), tmp_path)
    chosen = cfrbench.sweep.plan(cfrbench.RunConfig(preset="smoke", set=PHANTOM, label_seeds=(0, 1, 2, 3)), tmp_path)
    assert plain.name == "phantom-mt-" + plain.name[-8:] != chosen.name
    ours, theirs = ({t.key for chain in p.chains.values() for t in chain} for p in (plain, chosen))
    upper = plain.chains[next(c for c in plain.chains if c.ssl == "supervised" and c.labels == 4)]
    assert {task.key for task in upper} <= ours & theirs
    assert all(not (cell.fold or cell.choice) for cell in plain.chains)


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 to 6 folds"):
        cfrbench.run(preset="smoke", set=PHANTOM, folds=7, store=tmp_path)
    with pytest.raises(UsageError, match="official split"):
        cfrbench.ablate("concat", preset="smoke", set=PHANTOM, folds=2, store=tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# what the spread says


def rows_of(dice: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    """Dice of (variant, choice), one value a case."""
    known = {"dataset": "la", "concat": "grid", "model": "m", "tune": "lora", "net": "vnet", "ssl": "mt", "title": "MT",
             "labels": 1, "unlabelled": 9, "seed": 0, "fold": "", "split": "", "class": "c", "metric": "dice",
             "empty": ""}  # fmt: skip
    return pd.DataFrame([
        known | {"variant": variant, "choice": choice, "case": str(case), "value": value}
        for (variant, choice), values in dice.items() for case, value in enumerate(values)
    ])  # fmt: skip


def test_the_table_says_whether_the_case_matters_more_than_the_method() -> None:
    from cfrbench.report.repeats import notes

    facts = {
        "split": "",
        "splits": [{"fold": "", "choice": c, "sha256": c, "labelled": {"1": ["x" + c]}} for c in "01"],
    }
    wide = rows_of(
        {("baseline", "0"): [20, 30], ("baseline", "1"): [60, 70], ("cfr", "0"): [50, 50], ("cfr", "1"): [60, 60]}
    )
    named, spread = notes(wide, facts)
    assert named == "Labelled with 1 label: choice 0 x0; choice 1 x1."
    assert "MT 25.00 to 65.00, MT + CFR 50.00 to 60.00" in spread
    assert "by up to 40.00, more than the 10.00 between these rows' means" in spread
    narrow = rows_of({("baseline", "0"): [20], ("baseline", "1"): [21], ("cfr", "0"): [50], ("cfr", "1"): [52]})
    assert "by up to 2.00, not more than the 30.50" in notes(narrow, facts)[1]
    assert notes(wide, {"split": "", "splits": facts["splits"][:1]}) == []
