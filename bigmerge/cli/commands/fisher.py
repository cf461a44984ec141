"""`bigmerge fisher`: measure a model's diagonal Fisher information."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bigmerge.cli import console
from bigmerge.errors import BigmergeError, Interrupted
from bigmerge.quantities import format_bytes, format_seconds

_DATA = "Data"
_ESTIMATE = "Estimate"
_MACHINE = "Machine"
_OUTPUT = "Output"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(name="fisher")(fisher)


def fisher(
    model: Annotated[str, typer.Argument(help="Model directory or Hugging Face hub name.", metavar="MODEL")],
    dataset: Annotated[
        str,
        typer.Option(
            help="File (csv, tsv, json, jsonl, parquet, txt), directory (saved data set or data files), or hub "
            "name.",
            rich_help_panel=_DATA,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Directory to write. [default: MODEL-fisher]", rich_help_panel=_OUTPUT
        ),
    ] = None,
    subset: Annotated[
        str | None,
        typer.Option(help="Configuration of a hub data set that has several.", rich_help_panel=_DATA),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to read.", rich_help_panel=_DATA)] = "train",
    text_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of the text; twice for a sentence pair. [default: by usual names]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the data labels, which only empirical labels need. [default: label or labels]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Cut inputs to this many tokens. [default: what the model takes]", rich_help_panel=_DATA
        ),
    ] = None,
    num_examples: Annotated[int, typer.Option(help="Rows to use, at most.", rich_help_panel=_DATA)] = 4096,
    seed: Annotated[
        int, typer.Option(help="Keys the choice of rows and every drawn label.", rich_help_panel=_DATA)
    ] = 0,
    shuffle: Annotated[
        bool,
        typer.Option(help="Choose rows at random, or take the first ones.", rich_help_panel=_DATA),
    ] = True,
    task: Annotated[
        str,
        typer.Option(
            help="auto (by the model's architecture), sequence-classification or causal-lm.",
            rich_help_panel=_ESTIMATE,
        ),
    ] = "auto",
    labels: Annotated[
        str,
        typer.Option(
            help="auto (by the task), exact (expectation over all classes), sampled (drawn from the model) or "
            "empirical (those of the data).",
            rich_help_panel=_ESTIMATE,
        ),
    ] = "auto",
    draws: Annotated[
        int, typer.Option(help="Labels drawn per position when sampled.", rich_help_panel=_ESTIMATE)
    ] = 1,
    per_example: Annotated[
        str,
        typer.Option(
            help="How gradients are told apart: auto, hooks (in batches) or loop (one by one).",
            rich_help_panel=_ESTIMATE,
        ),
    ] = "auto",
    multi_gpu: Annotated[
        bool,
        typer.Option(
            "--multi-gpu",
            help="One process per GPU; where there is none, one CPU process per core.",
            rich_help_panel=_MACHINE,
        ),
    ] = False,
    num_processes: Annotated[
        int | None, typer.Option(help="Start this many processes.", rich_help_panel=_MACHINE)
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay off the GPUs.", rich_help_panel=_MACHINE)] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Most examples in one batch. [default: as many as --memory suggests]",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    memory: Annotated[
        str,
        typer.Option(
            help="For activations and per-example blocks of each process, beyond the model and its sums.",
            rich_help_panel=_MACHINE,
        ),
    ] = "1GiB",
    save_every: Annotated[
        float,
        typer.Option(
            help="Seconds between saves of the sums, from which an interrupted run goes on.",
            rich_help_panel=_MACHINE,
        ),
    ] = 300.0,
    dtype: Annotated[
        str, typer.Option(help="Storage dtype: float32 or bfloat16.", rich_help_panel=_OUTPUT)
    ] = "float32",
    shard_size: Annotated[str, typer.Option(help="Largest output file.", rich_help_panel=_OUTPUT)] = "5GB",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an existing output when the new one is complete.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only check and tell what would be done.", rich_help_panel=_OUTPUT),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_OUTPUT)
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="No progress bar, only warnings.", rich_help_panel=_OUTPUT),
    ] = False,
) -> None:
    """Measure the diagonal of a model's Fisher information on a data set.

    The result is a checkpoint with the model's tensor names, which `bigmerge merge` finds by its name
    (MODEL-fisher) or by the fingerprint of the model recorded in it.
    """
    from bigmerge.processes import joined_rank

    is_main = joined_rank() == 0
    console.set_up_logging(quiet=quiet or not is_main)
    try:
        with console.sigterm_as_interrupt():
            from bigmerge.fisher.api import estimate_fisher

            result = estimate_fisher(
                model,
                output,
                dataset=dataset,
                subset=subset,
                split=split,
                task=task,
                text_columns=text_column or (),
                label_column=label_column,
                max_length=max_length,
                num_examples=num_examples,
                seed=seed,
                shuffle=shuffle,
                labels=labels,
                draws=draws,
                per_example=per_example,
                batch_size=batch_size,
                memory=memory,
                dtype=dtype,
                multi_gpu=multi_gpu,
                num_processes=num_processes,
                cpu=cpu,
                save_every=save_every,
                shard_size=shard_size,
                overwrite=overwrite,
                dry_run=dry_run,
                progress=not quiet,
            )
    except KeyboardInterrupt:
        # Here rather than in `main`: typer would turn it into its own message and exit code.
        error: BigmergeError = Interrupted("interrupted; the same command goes on from the last saved state")
    except BigmergeError as raised:
        error = raised
    else:
        if is_main:
            console.emit(result, _text(result), as_json=as_json)
        return
    if is_main:
        raise error
    # Among processes that a launcher started, all end with the same error. The main one reports it, and needs
    # a moment to, before the launcher notices that another has ended and stops it.
    time.sleep(2)
    raise typer.Exit(error.exit_code)


def _text(result: dict[str, Any]) -> str:
    """What was done, or would be, for people."""
    lines = [
        f"{result['model']} on {result['dataset']} ({', '.join(result['columns'])})",
        f"  task      {result['task']}",
        f"  labels    {result['labels']}"
        + (f", {result['draws']} draws" if result["labels"] == "sampled" else ""),
        f"  engine    {result['engine']}, {result['processes']} process(es) on {result['device']}",
        f"  examples  {result['examples']} ({result['tokens']} positions scored)",
    ]
    if result["skipped"]:
        lines.append(f"  left out  {result['skipped']} rows with nothing to score")
    if result["dry_run"]:
        lines += [
            f"  memory    {format_bytes(result['bytes_per_process'])} in each process",
            f"  output    {format_bytes(result['output_bytes'])} in {result['output']} (nothing written yet)",
        ]
    else:
        lines += [
            f"  trace     {result['fisher']['sum']:.6g} over {result['parameters']} parameters",
            f"  time      {format_seconds(result['seconds'])}",
            f"  written   {result['output']}",
        ]
    return "\n".join(lines)
