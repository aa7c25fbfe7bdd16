"""The matrix of a request: its cells, on the official split or on the folds and label choices that it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cfrbench import registry
from cfrbench.errors import ConfigError, DataError
from cfrbench.prepared.folds import folds, with_labels_of
from cfrbench.recipes import Cell, Study, check_fit
from cfrbench.volume import Split

SUPERVISED = "supervised"


@dataclass(frozen=True)
class Repeat:
    """One use of the data. ``fold`` is "2/5", "" on the official split; ``choice`` the label seed, "" in list order.

    study: on the lists of this repeat. base: on those of its fold in list order, where the upper bound stands: which
    cases are labelled makes no difference to it.
    """

    study: Study
    base: Study
    fold: str = ""
    choice: str = ""

    @property
    def split(self) -> Split:
        """The lists."""
        return self.study.split


def repeats_of(study: Study) -> tuple[Repeat, ...]:
    """Every use of the data that the request asks for; the official split alone without `folds` and `label_seeds`."""
    config, bare = study.config, study.source.without_label()
    bases = [("", study)]
    if config.folds:
        made = folds(study.split, study.source.patients(), bare, config.folds, config.fold_seed)
        bases = [(f"{number}/{config.folds}", study.on(split)) for number, split in enumerate(made, 1)]
    if not config.label_seeds:
        return tuple(Repeat(base, base, fold) for fold, base in bases)
    return tuple(
        Repeat(base.on(with_labels_of(base.split, bare, seed)), base, fold, str(seed))
        for fold, base in bases
        for seed in dict.fromkeys(config.label_seeds)
    )


def cells_of(repeats: Sequence[Repeat]) -> dict[Cell, Study]:
    """The cells in table order, each with the study its chain is made of. ConfigError for an impossible budget."""
    most = labelled_total(repeats)
    return {cell: study for repeat in repeats for cell, study in _cells(repeat, most)}


def labelled_total(repeats: Sequence[Repeat]) -> int:
    """How many training cases have a label, in every fold."""
    return min(_labelled(repeat.base) for repeat in repeats)


def _labelled(study: Study) -> int:
    bare = study.source.without_label()
    return sum(case not in bare for case in study.split.train)


def _cells(repeat: Repeat, most: int) -> Iterator[tuple[Cell, Study]]:
    study, base = repeat.study, repeat.base
    config, total = study.config, len(study.split.train)
    budgets = dict.fromkeys(budget(study, label) for label in config.labels)
    methods = [registry.load("ssl", name) for name in dict.fromkeys(config.ssl)]
    guided = [m for m in methods if m.uses_unlabelled]
    for seed in dict.fromkeys(config.seeds):
        for n in dict.fromkeys([*budgets, most]) if config.bounds or SUPERVISED in config.ssl else ():
            whole = n == most
            yield make_cell(SUPERVISED, "baseline", n, total, seed, repeat, whole), base if whole else study
        for labels in budgets:
            if guided and labels == total:
                raise ConfigError(f"With {labels} of {total} training cases labelled, nothing is left unlabelled for "
                                  f"{', '.join(m.name for m in guided)}. Ask for fewer labels.")  # fmt: skip
            for method in guided:
                for variant in ("baseline", "cfr") if config.baseline else ("cfr",):
                    yield make_cell(method.name, variant, labels, total, seed, repeat), study
            if guided and _scorable(study, labels):
                yield pseudo_cell(study, labels, total, seed, repeat), study
    if guided:
        check_pair(study)


def _scorable(study: Study, labels: int) -> bool:
    """Whether pseudo-labels can be held against a truth: one's own unlabelled scans often have none."""
    return not study.source.without_label().issuperset(study.split.unlabelled(labels))


def check_pair(study: Study) -> None:
    """PluginError if the fine-tuner of a study does not fit its foundation model."""
    tuner = registry.load("tune", study.config.tune)()
    model = registry.load("model", study.config.model_name)()
    check_fit(tuner, model)


def make_cell(
    name: str, variant: str, labels: int, total: int, seed: int, repeat: Repeat, whole: bool = False
) -> Cell:  # fmt: skip
    """The cell of an SSL method with ``labels`` of ``total`` training cases labelled; whole: with all there are."""
    method = registry.load("ssl", name)
    unlabelled = total - labels if method.uses_unlabelled else 0
    return Cell(name, method.title, variant, labels, unlabelled, seed, **_where(repeat, whole))


def pseudo_cell(study: Study, labels: int, total: int, seed: int, repeat: Repeat) -> Cell:
    """The cell of the fine-tuned model itself, scored on its pseudo-labels."""
    model = registry.load("model", study.config.model_name)
    title = f"{model.title} + {study.config.tune}"
    return Cell("none", title, "pseudo-label", labels, total - labels, seed, **_where(repeat))


def _where(repeat: Repeat, whole: bool = False) -> dict[str, Any]:
    split = repeat.base.split if whole else repeat.split
    return {"fold": repeat.fold, "choice": "" if whole else repeat.choice, "split": split.sha256[:12]}


def budget(study: Study, label: int | str) -> int:
    """A number of labelled cases; ``scarce`` and ``moderate`` are the data set's own."""
    if isinstance(label, int):
        count = label
    elif label in study.source.budgets:
        count = study.source.budgets[label]
    else:
        known = ", ".join(study.source.budgets) or "none"
        raise ConfigError(f"'{label}' is not a budget of {study.source.title}. Give a number, or one of: {known}.")
    study.split.labelled(count)
    if count > _labelled(study):
        raise DataError(f"{count} labelled cases were asked for, but only {_labelled(study)} of the "
                        f"{len(study.split.train)} training cases have a label. Ask for fewer.")  # fmt: skip
    return count


# ---------------------------------------------------------------------------------------------------------------------
# what a record says of it


def split_words(study: Study, repeats: Sequence[Repeat]) -> str:
    """The split in words: its own note, or how the folds were made."""
    config = study.config
    if not config.folds:
        return study.split.note
    tested = sum(len(repeat.split.test) for repeat in {repeat.fold: repeat for repeat in repeats}.values())
    return (f"cross-validation in {config.folds} folds with seed {config.fold_seed}, the cases of a patient together; "
            f"each of {tested} labelled cases is tested once, after training on {len(repeats[0].split.train)} "
            "others.")  # fmt: skip


def split_facts(repeats: Sequence[Repeat]) -> list[dict[str, Any]]:
    """Of each repeat: fold, choice, hash of the lists, and which cases are labelled at each budget."""
    return [
        {"fold": repeat.fold, "choice": repeat.choice, "sha256": repeat.split.sha256,
         "labelled": {str(n): list(repeat.split.labelled(n))
                      for n in dict.fromkeys(budget(repeat.study, label) for label in repeat.study.config.labels)}}
        for repeat in repeats
    ]  # fmt: skip
