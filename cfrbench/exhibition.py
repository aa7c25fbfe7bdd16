"""What an ablation shows: its table as text, its charts, the canvases of one case; and the canvases of any case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cfrbench.config import RunConfig, Settings, Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import UsageError, suggest
from cfrbench.files import storage_errors, write_atomic
from cfrbench.formats import read_labels
from cfrbench.inference import pad_to
from cfrbench.layouts import contents, spread, tiles
from cfrbench.prepare import Library, WorkingCase
from cfrbench.recipes import WORKING, Study, open_source, study_of
from cfrbench.report import ablations, charts, pictures, tables, writers
from cfrbench.report.pictures import Panel
from cfrbench.stages import make
from cfrbench.store import Store
from cfrbench.sweep import Result
from cfrbench.volume import IGNORE

Draw = Callable[[Path], None]


# ---------------------------------------------------------------------------------------------------------------------
# an ablation


def make_folder(folder: Path) -> None:
    """Make the folder of an exhibition; StoreError, before anything is computed, if it cannot be."""
    with storage_errors("make the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)


def exhibit(result: Result, store: Path, folder: Path) -> list[Path]:
    """Write table.md, table.csv and the pictures of an ablation into ``folder``; what was written, in that order.

    Everything is drawn from the store and the data set; nothing is computed anew.
    """
    make_folder(folder)
    shown = ablations.all_tables(result.cases, result.facts)
    written = []
    for name, write in (("table.md", writers.to_markdown), ("table.csv", writers.to_csv)):
        write_atomic(folder / name, "\n".join(write(table) for table in shown).encode())
        written.append(folder / name)
    rows, about = ablations.scored(result.cases, result.facts)
    if not rows:
        return written
    for name, draw in _pictures(result, rows, about, store):
        draw(folder / name)
        written.append(folder / name)
    return written


def _pictures(
    result: Result, rows: list[dict[Any, Any]], about: list[Mapping[str, Any]], store: Path
) -> Iterator[tuple[str, Draw]]:
    """File name and drawing of each picture that this kind of ablation has."""
    ablation = result.facts["ablation"]
    kind, seeds = ablation["kind"], len(rows[0]["seeds"])
    title = f"{tables.heading(result.facts)}, {ablation['labels']} labelled"
    what = "Dice (%)" if kind == "pseudo" else "Dice of pseudo-labels (%)"
    axis = f"{what}, ± {f'{seeds} seeds' if seeds > 1 else 'cases'}"
    bars = [charts.Bar(row["title"], row["dice"], charts.spread_of(row), row["title"] == "grid") for row in rows]
    yield "dice.png", partial(charts.draw_bars, bars, title, axis)
    curve = [(one["scale"], bar) for one, bar in zip(about, bars, strict=True) if one["scale"]]
    if len(curve) > 1:
        grid = next((bar for bar in bars if bar.highlighted), None)
        yield "scale.png", partial(charts.draw_curve, curve, grid, title, axis)
    points = [charts.Point(row["title"], one["parameters"], one["trainable_parameters"], row["dice"])
              for row, one in zip(rows, about, strict=True) if one["parameters"]]  # fmt: skip
    if kind == "tune" and points:
        yield "parameters.png", partial(charts.draw_parameters, points, title, what)
    if kind != "pseudo":
        yield "canvases.png", partial(_draw_predictions, result, [row["title"] for row in rows], Store(store))


def _draw_predictions(result: Result, labels: Sequence[str], home: Store, path: Path) -> None:
    """Each variant's canvas of the first scored case, with truth and pseudo-label of the first seed."""
    cells = {cell["title"]: cell for cell in reversed(home.run(result.name)["cells"])}
    config = result.config
    source = open_source(config.dataset, config.data_root, config.set)
    panels, library = [], None
    for label in labels:
        tuned, pseudo = (home.find_any(stage, cells[label]["keys"]) for stage in ("tune", "pseudo"))
        if tuned is None or pseudo is None:  # scored earlier, and removed from the store since
            continue
        settings = Settings.model_validate(tuned.manifest["recipe"]["settings"])
        library = library or Library(source, settings.grid)
        (case, mask), *_ = read_labels(pseudo.path(WORKING)).items()
        dice = result.cases.query("title == @label and case == @case and metric == 'dice'")["value"].mean()
        laid = Laid.out(make("concat", tuned.manifest["recipe"]["concat"]), settings, library[case])
        panels.append(laid.panel(f"{label}, Dice {dice:.1f}", laid.fullest, mask))
    if panels:
        title = f"{source.title} {case}: pseudo-labels, and the truth dashed"
        pictures.draw_canvases(panels, title, path)


# ---------------------------------------------------------------------------------------------------------------------
# canvases


@dataclass(frozen=True)
class Laid:
    """The crop in the middle of a case, laid out."""

    strategy: ConcatStrategy
    layout: Layout
    image: Tensor
    label: Tensor | None

    @classmethod
    def out(cls, strategy: ConcatStrategy, settings: Settings, case: WorkingCase, done: float | None = None) -> Laid:
        """Lay a case out as for prediction, or as fine-tuning does when the share ``done`` of it is over."""
        section, crop = settings.tuning, settings.tuning.patch or settings.training.patch
        if done is None:
            layout = strategy.plan(crop, section.canvas, overflow=section.overflow)
        else:
            layout = strategy.plan_training(crop, section.canvas, overflow=section.overflow, done=done)
        label = None if case.label is None else middle(case.label, crop, IGNORE)
        return cls(strategy, layout, middle(case.image, crop, 0.0), label)

    @property
    def fullest(self) -> int:
        """The canvas with most labelled pixels; the first one without a label."""
        if self.label is None:
            return 0
        canvases = self.strategy.forward(self.label, self.layout, IGNORE)
        return int(((canvases > 0) & (canvases != IGNORE)).sum((-2, -1)).argmax())

    def panel(self, title: str, number: int, mask: Tensor | None = None) -> Panel:
        """Canvas ``number`` with its label and, if a mask of the whole case is given, that prediction."""
        prediction = None if mask is None else self._canvas(middle(mask, self.layout.shape, IGNORE), number, IGNORE)
        truth = None if self.label is None else self._canvas(self.label, number, IGNORE)
        return Panel(title, self._canvas(self.image, number, 0.0), truth, prediction)

    def _canvas(self, volume: Tensor, number: int, fill: float) -> Any:
        return self.strategy.forward_some(volume, self.layout, fill, [number])[0].numpy()


def middle(volume: Tensor, crop: Triple, fill: float) -> Tensor:
    """The crop in the middle of ``(H, W, D)``, padded with ``fill`` where the volume is smaller."""
    padded, _ = pad_to(volume, crop, fill)
    starts = [(side - length) // 2 for side, length in zip(padded.shape, crop, strict=True)]
    x, y, z = (slice(start, start + length) for start, length in zip(starts, crop, strict=True))
    return padded[x, y, z]


def show_canvases(
    config: RunConfig, case: str | None, output: Path, *, most: int, done: float | None
) -> dict[str, Any]:
    """Draw up to ``most`` canvases of a case (the first training case by default); facts of the layout."""
    study = study_of(config)
    known = [*study.split.train, *study.split.val, *study.split.test]
    case = case or known[0]
    if case not in known:
        raise UsageError(f"{study.source.title} has no case '{case}'. {suggest(case, known)}")
    strategy: ConcatStrategy = study.make("concat", config.concat)
    working = Library(study.source, study.settings.grid)[case]
    laid = Laid.out(strategy, study.settings, working, done)
    count = laid.layout.count
    panels = [laid.panel(f"canvas {n + 1} of {count}", n) for n in spread(count, most)]
    when = "" if done is None else f", {done:.0%} of fine-tuning over"
    pictures.draw_canvases(panels, f"{study.source.title} {case}, {config.concat}{when}: the truth dashed", output)
    return {"case": case, "volume": list(working.shape)} | _facts(study, strategy, laid.layout)


def _facts(study: Study, strategy: ConcatStrategy, layout: Layout) -> dict[str, Any]:
    shown, grid = contents(strategy, layout), tiles(layout)
    input_size = study.make("model", study.config.model_name).input_size
    return {
        "crop": list(layout.shape),
        "canvases": layout.count,
        "side": strategy.canvas_side(layout.shape, study.settings.tuning.canvas),
        "input": strategy.input_side(layout.shape, input_size),
        "tiles": grid[:2] if grid else None,
        "blank_tiles": grid[2] if grid else None,
        "slices": layout.shape[2],
        "slices_per_canvas": shown.slices,
        "ignored": shown.ignored,
    }
