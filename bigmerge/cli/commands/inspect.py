"""`bigmerge inspect`: what a checkpoint or Fisher is."""

from __future__ import annotations

from typing import Annotated

import typer

from bigmerge.cli import console


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)


def inspect(
    path: Annotated[str, typer.Argument(help="A model, a Fisher, a weight file, or a hub name.")],
    tensors: Annotated[bool, typer.Option("--tensors", "-t", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a checkpoint is: tensors, dtypes, sizes; for a Fisher, how it was estimated and where its mass is."""
    from bigmerge.inspection import inspect_checkpoint

    console.set_up_logging()
    found = inspect_checkpoint(path)
    console.emit(found.as_json(), found.describe(tensors=tensors), as_json=as_json)
