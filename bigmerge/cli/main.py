"""The `bigmerge` command: finds its subcommands, prints results and errors, sets the exit code.

Each module in `bigmerge.cli.commands` is one subcommand and has a function `register(app)`. Modules there
import typer and nothing heavy at the top; torch and friends are imported when the command runs.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from bigmerge import __version__
from bigmerge.cli import commands, console
from bigmerge.errors import BigmergeError, Interrupted

_EPILOG = (
    "Results go to standard output, progress and logs to standard error. Exit codes: 0 done, 1 other error, "
    "2 wrong usage, 3 unusable input, 4 output cannot be written, 5 memory or disk budget, 6 cannot resume, "
    "7 verification failed, 8 Fisher estimation failed, 130 interrupted (the same command goes on)."
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"bigmerge {__version__}")
        raise typer.Exit


def build_app() -> typer.Typer:
    """The typer application with every subcommand registered."""
    app = typer.Typer(name="bigmerge", no_args_is_help=True, epilog=_EPILOG, pretty_exceptions_enable=False)

    @app.callback(help="Merge models that are larger than memory, weighted by their Fisher information.")
    def root(
        version: Annotated[
            bool,
            typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
        ] = False,
    ) -> None:
        del version

    for info in pkgutil.iter_modules(commands.__path__):
        importlib.import_module(f"{commands.__name__}.{info.name}").register(app)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own) and exit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        build_app()(args=arguments, prog_name="bigmerge")
    except BigmergeError as error:
        if not error.reported:
            console.report_error(error, as_json="--json" in arguments)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.report_error(Interrupted("interrupted"), as_json=False)
        sys.exit(Interrupted.exit_code)
    except BrokenPipeError:
        sys.exit(0)
