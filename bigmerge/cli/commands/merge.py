"""`bigmerge merge`: models, and Fishers beside them, into one model."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from bigmerge.cli import console
from bigmerge.methods.base import METHODS, parameters_of


def register(app: typer.Typer) -> None:
    """Add the command, with an option for every parameter of every merge method."""

    @functools.wraps(merge)
    def command(**arguments: Any) -> None:
        merge(**arguments)

    command.__signature__ = _with_method_options(inspect.signature(merge, eval_str=True))  # type: ignore[attr-defined]
    app.command("merge")(command)


def merge(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model directories, weight files (the shards of a model are recognised), their Fishers, or "
            "Hugging Face hub names; a shell pattern such as shards/* just works.",
            metavar="SOURCES...",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; it appears when complete.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help=f"One of: {', '.join(METHODS.names())}. Default: fisher if every model has a Fisher, else linear.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model, after those in SOURCES; repeatable.")
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="λ, once for every model in their order. Default: equal."),
    ] = None,
    fisher: Annotated[
        list[str] | None, typer.Option("--fisher", help="The Fisher of each --model, in the same order.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="The model that heads, dtypes, config and tokenizer come from. Default: the first."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The pre-trained model: the result is base + scale · (merged − base).")
    ] = None,
    scale: Annotated[float, typer.Option(help="How far to move from the base.")] = 1.0,
    include: Annotated[
        list[str] | None, typer.Option(help="Merge only tensors that match this glob; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Take tensors that match this glob from the target; repeatable.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Make any tensor that cannot be merged an error.")
    ] = False,
    merge_heads: Annotated[
        bool, typer.Option("--merge-heads", help="Merge task heads of equal shape too.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the output, e.g. bfloat16. Default: as in the target.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Most data in one output file.")] = "5GB",
    memory: Annotated[
        str, typer.Option(help="Working memory beyond the interpreter and torch; kept or refused.")
    ] = "256MiB",
    workers: Annotated[
        int | None, typer.Option(help="Most threads of each process. Default: the cores, divided.")
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes that share the work on this machine, each within --memory.")
    ] = 1,
    io: Annotated[
        str | None,
        typer.Option(
            help="How inputs are read: mmap; pread (network file systems, dozens of models in little memory); "
            "direct (past the page cache, the output too). Default: direct if most is not cached and on a local "
            "disk, else mmap, or pread where memory is short.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the arithmetic is done: cpu, cuda, cuda:1, …")] = "cpu",
    profile: Annotated[
        bool, typer.Option("--profile", help="Also print where the time went: read, compute, write, wait.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output once the new one is complete.")
    ] = False,
    discard: Annotated[
        bool, typer.Option("--discard", help="Remove the unfinished work towards the output, and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, from headers alone, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only warnings.")] = False,
    **method_options: Any,
) -> None:
    """Merge models that are larger than memory into one, tensor by tensor.

    A directory with weights is one model; so are the numbered files of one, and any single weight file. A
    Fisher (from `bigmerge fisher`) beside its model is found by itself. An interrupted merge goes on when the
    same command is given again.
    """
    from bigmerge.errors import UsageError
    from bigmerge.merging.api import describe_result, execute_plan, plan_merge
    from bigmerge.processes import joined_rank
    from bigmerge.quantities import format_bytes
    from bigmerge.storage.staging import check_free, partial_path
    from bigmerge.storage.staging import discard as remove_unfinished

    told_by_another = joined_rank() > 0  # of the processes that a launcher has started, one speaks
    quiet = quiet or told_by_another
    console.set_up_logging(quiet=quiet)
    if out is None:
        raise UsageError("where should the merged model go?", hint="-o DIRECTORY")
    if out.name.endswith((".safetensors", ".bin", ".pt")):
        raise UsageError(f"{out}: the output is a directory", hint=f"-o {out.with_suffix('')}")
    if discard:
        if sources or model:
            raise UsageError("--discard takes no models: it removes what another merge has left unfinished")
        removed = remove_unfinished(out)
        told = {"discarded": str(partial_path(out)), "bytes": removed}
        text = f"removed {partial_path(out)}, {format_bytes(removed)}"
        console.emit(told, text, as_json=as_json)
        return
    with console.interruptible(), console.sigterm_as_interrupt():
        if not dry_run:
            check_free(out, overwrite=overwrite)
        plan = plan_merge(
            sources or [],
            out,
            models=model or [],
            weights=weight or [],
            fishers=fisher or [],
            method=method,
            target=target,
            base=base,
            scale=scale,
            include=include or [],
            exclude=exclude or [],
            strict=strict,
            merge_heads=merge_heads,
            dtype=dtype,
            shard_size=shard_size,
            memory=memory,
            workers=workers,
            io=io,
            device=device,
            processes=processes,
            method_options=_given(method_options),
        )
        if dry_run:
            if not told_by_another:
                console.emit(plan.as_json(), plan.describe(), as_json=as_json)
            return
        result = execute_plan(plan, overwrite=overwrite, progress=not quiet)
    told, text = result.as_json(), describe_result(result, plan)
    if profile:
        told["profile"] = result.profile.as_json()
        text += "\n" + result.profile.describe()
    if not told_by_another:
        console.emit(told, text, as_json=as_json)


def _with_method_options(signature: inspect.Signature) -> inspect.Signature:
    """`signature` with `--METHOD-PARAMETER` options, read off the methods themselves."""
    parameters = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    for method in METHODS:
        for option in parameters_of(method):
            flag = f"--{method.name}-{option.name}".replace("_", "-")
            default = option.default
            if isinstance(default, bool):
                default = "yes" if default else "no"
            literal = get_origin(option.kind) is Literal
            choices = f" One of {', '.join(map(str, get_args(option.kind)))}." if literal else ""
            declared = typer.Option(
                f"{flag}/--no-{flag[2:]}" if option.kind is bool else flag,
                help=f"{option.help}{choices} Default: {default}.",
                rich_help_panel=f"Method {method.name}",
                show_default=False,
            )
            kind: Any = str if literal else option.kind
            parameters.append(
                inspect.Parameter(
                    f"{method.name}__{option.name}",
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kind | None, declared],
                )
            )
    return signature.replace(parameters=parameters)


def _given(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The method options that were given: method → parameter → value."""
    given: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        if value is not None:
            method, _, parameter = key.partition("__")
            given.setdefault(method, {})[parameter] = value
    return given
