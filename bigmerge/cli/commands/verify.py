"""`bigmerge verify`: check a checkpoint's files against their headers, index and manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bigmerge.cli import console


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify")(verify)


def verify(
    path: Annotated[Path, typer.Argument(help="A merged model, a Fisher, or any checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Check that a checkpoint is whole: valid headers, nothing missing, contents as the manifest records.

    Exit code 7 if anything is not as it should be.
    """
    from bigmerge.errors import VerificationError
    from bigmerge.verification import verify as run

    console.set_up_logging(quiet=quiet)
    with console.interruptible():
        result = run(path, progress=not quiet)
    console.emit(result.as_json(), result.describe(), as_json=as_json)
    if not result.ok:
        raise typer.Exit(VerificationError.exit_code)
