"""Any task of the Medical Segmentation Decathlon, by its ``dataset.json``; or images and labels in two folders.

The Decathlon keeps the labels of its test images, and the field has no common split of its training images, so the
split is made here, by seed, patients kept together. Images with several channels need one chosen:
``--set data.msd.channel=0``. Files are read as they are; ``cfrbench data prepare`` makes that fast.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from cfrbench.config import Frozen
from cfrbench.contracts import DataSource
from cfrbench.errors import DataError
from cfrbench.hookspecs import hookimpl
from cfrbench.prepared import label_maps
from cfrbench.prepared.label_maps import LabelMap
from cfrbench.prepared.nifti import read_header
from cfrbench.prepared.pair_reader import Reading, read_pair
from cfrbench.prepared.pairs import Found, Pair, Search, find_pairs
from cfrbench.prepared.places import Files, Layout
from cfrbench.prepared.proposals import propose
from cfrbench.prepared.public import PublicSource
from cfrbench.prepared.splits import Candidate, SplitChoice, make_split
from cfrbench.prepared.writing import CaseJob
from cfrbench.scan_steps import ScanSteps
from cfrbench.volume import Split


class Decathlon(PublicSource):
    """One task: its classes are those of its file."""

    class Config(PublicSource.Config):
        """Split, channel, classes."""

        channel: int | None = Field(None, description="of images with several, from 0")
        seed: int = Field(0, ge=0, description="of the split")
        test: float = Field(0.2, gt=0, description="share of the patients below 1, their number from 1 on")
        classes: tuple[str, ...] | None = Field(None, description="taken from dataset.json if left empty")

    config: Config
    name = "msd"
    title = "Decathlon"
    modality = "as the task says"
    licence = "CC BY-SA 4.0"
    origin = "http://medicaldecathlon.com"
    class_names: ClassVar[tuple[str, ...]] = ("background", "foreground")
    budgets: ClassVar = {"scarce": 1}
    layouts = (Layout("nifti", ("image", ("imagesTr/{case}",)), read_pair, Reading(),
                      {"label": ("../labelsTr/{case}",)}, ready=True),)  # fmt: skip
    lists: ClassVar = {}

    def __init__(self, config: Any = None, root: Path | None = None) -> None:
        super().__init__(config, root)
        names = self.config.classes
        if self.is_prepared:
            record = self.prepared.record
            vars(self).update(title=record.title, modality=record.modality)
            names = record.class_names
        elif names is None and self.root is not None and self.root.is_dir():
            names = self._stated()
        # A trained network can be used where the set is not, so classes that only the folder knows become an option.
        if names and names != type(self).class_names:
            self.config = self.config.model_copy(update={"classes": names})
            vars(self).update(class_names=names)

    def _stated(self) -> tuple[str, ...]:
        """Classes of the task's file, which also states title and modality; DataError without one."""
        facts = self.found.facts
        vars(self).update({key: facts[key] for key in ("title", "modality") if key in facts})
        if not self.found.class_names:
            raise DataError(f"{self.root} has no dataset.json that names its classes. Give the folder of a task; any "
                            "other folder goes through `cfrbench data import DIR --name NAME`.")  # fmt: skip
        return label_maps.of_names(self.found.class_names).names

    @cached_property
    def found(self) -> Found:
        """The pairs of the folder."""
        return find_pairs(self.folder(), Search(channel=self.config.channel))

    @property
    def pairs(self) -> dict[str, Pair]:
        """The usable pairs with labels by case: nothing can be learnt from the others here, nor scored on them."""
        return {pair.case: pair for pair in self.found.pairs if pair.label and pair.case not in self.excluded()}

    def cases_of(self, layout: Layout) -> dict[str, Files]:
        """Case -> image and label."""
        return {case: {"image": pair.image, "label": pair.label} for case, pair in self.pairs.items() if pair.label}

    def find(self, case: str) -> tuple[Layout, Files]:
        """The files of a case; DataError if the folder has none of that name."""
        cases = self.cases_of(self.layouts[0])
        return (self.layouts[0], cases[case]) if case in cases else super().find(case)

    def listed_split(self, cases: Collection[str], beside: Path) -> Split:
        """By seed, patients kept together; the training list in order of names."""
        candidates = [Candidate(case, self.pairs[case].patient, True, self.pairs[case].role) for case in cases]
        choice = SplitChoice(seed=self.config.seed, test=self.config.test)
        split, _ = make_split(candidates, choice)
        return Split(split.train, split.test, split.val, f"own split with seed {choice.seed}, patients kept together")

    def job(self, layout: Layout, case: str, files: Files, steps: ScanSteps | None = None,
            reading: Frozen | None = None) -> CaseJob:  # fmt: skip
        """As of other sets, with the channel."""
        made = super().job(layout, case, files, steps, reading)
        return replace(made, options={**made.options, "channel": self.config.channel})

    def labels_of(self, layout: Layout) -> LabelMap:
        """Raw value -> class, as the task's file says."""
        return label_maps.of_names(self.found.class_names)

    def protocol(self, preset: str) -> Mapping[str, Any]:
        """Proposed from the sizes of up to 20 training cases."""
        if self.root is None:
            return {}
        few = self.split().train[:20]
        if self.is_prepared:
            shapes = [self.prepared.case(case).shape for case in few]
        else:
            headers = [read_header(self.pairs[case].image, self.config.channel) for case in few]
            shapes = [header.turned_shape(self.axcodes) for header in headers]
        return propose(shapes)[preset]


@hookimpl
def data_sources() -> list[type[DataSource]]:
    """The Decathlon's tasks."""
    return [Decathlon]
