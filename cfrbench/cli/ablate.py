"""`cfrbench ablate concat | scale | pseudo | tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cfrbench.cli import app
from cfrbench.cli.common import (
    DEFAULT_STORE,
    ExecutorOption,
    JsonOption,
    StoreOption,
    parse_labels,
    parse_names,
    parse_seeds,
    parse_set,
    parse_sizes,
)
from cfrbench.config import PresetName, RunConfig, validate
from cfrbench.errors import UsageError

if TYPE_CHECKING:
    from cfrbench.ablation import AblationPlan
    from cfrbench.sweep import Result

EXAMPLES = """
**concat**: strategies (Figures 4, 5a). **scale**: n x n slices on a canvas (Figure 5b). **pseudo**: pseudo-labels per
volume and online, guidance weight constant and decaying. **tune**: fine-tuners (Figure 1).

Examples:

    cfrbench ablate concat

    cfrbench ablate concat --strategies grid,shuffled,scaled,natural-mix:medical=8 --scales 1,2,4 --seeds 2

    cfrbench ablate concat --dataset la --data-root DIR --steps 200 --cases 6 -o concat-la

    cfrbench ablate scale --scales 1,2,3,4

    cfrbench ablate pseudo --ssl mt --labels 1

    cfrbench ablate tune --tuners lora,lora:rank=16
"""

#: option -> kinds that it means something to
BELONGS = {
    "--strategies": ("concat",),
    "--natural-root": ("concat",),
    "--scales": ("concat", "scale"),
    "--tuners": ("tune",),
    "--ssl": ("pseudo",),
    "--cases": ("concat", "scale", "tune"),
    "--concat": ("pseudo", "tune"),
    "--tune": ("concat", "scale", "pseudo"),
}


Kinds = Annotated[Literal["concat", "scale", "pseudo", "tune"], typer.Argument(help="What is varied.")]
LabelsOption = Annotated[str, typer.Option(help="Labelled cases: a number, or scarce, moderate.")]
StrategiesOption = Annotated[
    str | None, typer.Option(help="concat: NAME or NAME:OPTION=VALUE, comma-separated.  [default: all built-in]")
]
ScalesOption = Annotated[
    str | None, typer.Option(help="concat, scale: n of the strategy scaled.  [default: 2,4; scale: 1,2,4.. to all]")
]
TunersOption = Annotated[
    str | None, typer.Option(help="tune: NAME or NAME:OPTION=VALUE, comma-separated.  [default: all built-in]")
]
StepsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Fine-tuning steps of each.  [default: the preset's; 100 with quick, but for pseudo]"),
]
CasesOption = Annotated[
    int | None, typer.Option(min=1, help="Score the first N unlabelled cases, the same for all.  [default: all]")
]
NaturalOption = Annotated[
    Path | None, typer.Option(help="concat: photographs for natural-mix (PASCAL VOC).  [default: scikit-image's]")
]
JobsOption = Annotated[
    int | None, typer.Option(min=1, help="Stages at a time; 1 times best.  [default: what the machine has room for]")
]
OutputOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder for table and pictures.  [default: ./ablation-KIND]")
]


@app.command(epilog=EXAMPLES)
def ablate(
    kind: Kinds,
    dataset: Annotated[str, typer.Option(help="Data set.")] = "phantom",
    data_root: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    labels: LabelsOption = "1",
    strategies: StrategiesOption = None,
    scales: ScalesOption = None,
    tuners: TunersOption = None,
    ssl: Annotated[str | None, typer.Option(help="pseudo: the SSL method to train.  [default: mt]")] = None,
    concat: Annotated[str | None, typer.Option(help="pseudo, tune: strategy.  [default: grid]")] = None,
    tune: Annotated[str | None, typer.Option(help="concat, scale, pseudo: fine-tuner.  [default: lora]")] = None,
    model: Annotated[str | None, typer.Option(help="Foundation model.  [default: the preset's]")] = None,
    steps: StepsOption = None,
    cases: CasesOption = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds: 0 .. N-1.  [default: 1]")] = None,
    seed_list: Annotated[str | None, typer.Option(help="These seeds, comma-separated.")] = None,
    preset: Annotated[PresetName, typer.Option(help="smoke, quick or paper.")] = "quick",
    natural_root: NaturalOption = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. tuning.canvas=320.")] = None,
    store: StoreOption = DEFAULT_STORE,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; part of what makes numbers equal.")] = None,
    jobs: JobsOption = None,
    executor: ExecutorOption = "local",
    output: OutputOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, run nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare variants of one thing under one budget and one protocol: table, charts, and pictures of canvases."""
    from cfrbench import ablation
    from cfrbench.cli import progress

    asked = {"--strategies": strategies, "--natural-root": natural_root, "--scales": scales, "--tuners": tuners,
             "--ssl": ssl, "--cases": cases, "--concat": concat, "--tune": tune}  # fmt: skip
    _refuse_strangers(kind, asked)
    base = _base(dataset=dataset, data_root=_absolute(data_root), labels=parse_labels(labels), ssl=ssl and (ssl,),
                 concat=concat, tune=tune, model=model, seeds=parse_seeds(seeds, seed_list), preset=preset,
                 set={**parse_set(set_), "compute.device": device, "compute.threads": threads,
                      "concat.natural-mix.root": natural_root and str(_absolute(natural_root))})  # fmt: skip
    request = ablation.request_of(kind, base, names=parse_names(strategies or tuners), steps=steps, cases=cases,
                                  scales=parse_sizes("--scales", scales))  # fmt: skip
    planned = ablation.plan(request, store)
    if dry_run:
        progress.show_plan(planned, as_json)
        _say_refused(planned)
    else:
        _execute(planned, executor, jobs, output or Path(f"ablation-{kind}"), as_json)


def _say_refused(planned: AblationPlan) -> None:
    for label, reason in planned.refused.items():
        typer.secho(f"not run: {label}: {reason}", err=True, fg=typer.colors.YELLOW)


def _refuse_strangers(kind: str, asked: dict[str, Any]) -> None:
    for option, value in asked.items():
        if value is not None and kind not in BELONGS[option]:
            its_own = ", ".join(f"`ablate {own}`" for own in BELONGS[option])
            raise UsageError(f"{option} means nothing to `ablate {kind}`, only to {its_own}. "
                             "Leave it out; other settings are set by --set KEY=VALUE.")  # fmt: skip


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser().absolute()


def _base(**asked: Any) -> RunConfig:
    """What all variants share; None means not asked."""
    values = {name: value for name, value in asked.items() if value is not None}
    values["set"] = {name: value for name, value in asked["set"].items() if value is not None}
    return validate(RunConfig, values, "the command line")


def _execute(planned: AblationPlan, executor: str, jobs: int | None, folder: Path, as_json: bool) -> None:
    """Run what is missing, print the table, write it and the pictures."""
    from cfrbench import exhibition, sweep
    from cfrbench.cli import progress

    exhibition.make_folder(folder)
    if not as_json:
        progress.header(planned.facts())
        _say_refused(planned)
    with progress.watch(quiet=as_json) as observer:
        side_by_side = jobs or sweep.default_jobs(planned, executor)
        result = sweep.execute(planned, executor=executor, jobs=side_by_side, observer=observer)
    written = exhibition.exhibit(result, planned.store, folder)
    if as_json:
        typer.echo(json.dumps(_plain(result, written), allow_nan=False))
    else:
        progress.show_result(result)
        typer.echo("wrote " + ", ".join(str(path) for path in written))
    if result.failures:
        raise typer.Exit(1)


def _plain(result: Result, written: list[Path]) -> dict[str, Any]:
    from cfrbench.report import ablations

    return {
        **result.as_json(),
        "rows": ablations.json_rows(result.cases, result.facts),
        "refused": result.facts["ablation"]["refused"],
        "files": [str(path) for path in written],
    }
