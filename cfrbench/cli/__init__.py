"""The command line: one file per command, no logic. Importing it imports neither torch nor pandas."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

import typer

from cfrbench import __version__
from cfrbench.errors import CfrbenchError
from cfrbench.heap import keep_freed_memory

app = typer.Typer(
    name="cfrbench",
    help="Benchmark semi-supervised 3D medical segmentation with and without a foundation model's pseudo-labels (CFR).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cfrbench {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Lay slices out, fine-tune, pseudo-label, re-train; baseline and CFR twin side by side.

    Begin with:  cfrbench run --ssl mt,acmt --labels 1,2,4,16
    """
    global _debug
    _debug = debug


def main() -> None:
    """Run a command; what cfrbench raises on purpose becomes one paragraph and an exit code."""
    # Large pages before torch makes its first tensor: same numbers, half the time on CPUs (docs/protocol.md). Set here
    # and not on import, because the environment of a host program is not ours.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # numpy's own threads would only fight those of torch and of other stages for the same cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    keep_freed_memory()
    from cfrbench.cli import (  # noqa: F401 - they register
        ablate,
        compare,
        concat,
        data,
        evaluate,
        housekeeping,
        model,
        plugins,
        predict,
        report,
        reproduce,
        run,
        share,
        ssl,
        status,
    )

    try:
        app()
    except CfrbenchError as error:
        if _debug:
            raise
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        typer.secho("Stopped.", err=True)
        sys.exit(130)
    finally:
        gc.freeze()  # at its end Python would search all that torch has made for cycles: up to two seconds
