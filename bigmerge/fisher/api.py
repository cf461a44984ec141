"""Fisher estimation as a Python function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigmerge.errors import UsageError
from bigmerge.fisher.settings import DataSettings, FisherSettings, ProcessSettings
from bigmerge.quantities import parse_bytes


def estimate_fisher(
    model: str | Path,
    out: str | Path | None = None,
    *,
    dataset: str | Path,
    subset: str | None = None,
    split: str = "train",
    task: str = "auto",
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    max_length: int | None = None,
    num_examples: int = 4096,
    seed: int = 0,
    shuffle: bool = True,
    labels: str = "auto",
    draws: int = 1,
    per_example: str = "auto",
    batch_size: int | None = None,
    memory: str | int = "1GiB",
    dtype: str = "float32",
    multi_gpu: bool = False,
    num_processes: int | None = None,
    cpu: bool = False,
    save_every: float = 300.0,
    shard_size: str | int = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the diagonal of a model's Fisher information and write it as a checkpoint.

    F = 1/N Σ_i E_{y∼p(y|x_i)} (∇ log p(y|x_i))², elementwise, over N examples.

    Called in several processes that a launcher (accelerate launch, torchrun) has started, they share the work;
    otherwise `multi_gpu` and `num_processes` start the processes.

    Args:
        model: model directory or Hugging Face hub name.
        out: directory to write. None: the model's directory with "-fisher" appended, which is how
            `merge` finds the Fisher of a model.
        dataset: a file (csv, tsv, json, jsonl, parquet, txt), a directory (saved data set or data files), or a hub
            name.
        subset: configuration of a hub data set that has several.
        split: split to read.
        task: "sequence-classification", "causal-lm", or "auto" to go by the model's architecture.
        text_columns: one column, or two for a sentence pair; empty to find them by their usual names.
        label_column: column of the data labels, which only empirical labels need.
        max_length: cut inputs to this many tokens; None: to what the model takes.
        num_examples: how many rows to use, at most.
        seed: keys the choice of rows and every drawn label.
        shuffle: False uses the first rows instead of a random choice.
        labels: "exact" (expectation over all classes), "sampled" (drawn from the model), "empirical" (those of
            the data), or "auto": the task's default.
        draws: labels drawn per position when sampled.
        per_example: "hooks", "loop", or "auto".
        batch_size: most examples in one batch; None: as many as `memory` suggests.
        memory: for activations and per-example blocks, beyond the model and its sums.
        dtype: storage dtype of the result, "float32" or "bfloat16". Sums are float32 in any case.
        multi_gpu: one process per GPU; where there is none, one CPU process per core.
        num_processes: start this many processes.
        cpu: stay off the GPUs.
        save_every: seconds between saves of the sums, from which an interrupted run goes on.
        shard_size: largest output file.
        overwrite: replace an existing `out` when the new one is complete.
        dry_run: only check everything and tell what would be done.
        progress: show a progress bar on standard error.

    Returns:
        What was done: output, task, labels, engine, examples, tokens, seconds and, under "fisher", all that the
        output's header records. On other than the main process of a launched group an empty dictionary.

    Raises:
        UsageError: arguments that contradict each other or the model.
        InputError: the model or the data is not usable (CheckpointError, DatasetError).
        OutputError: `out` exists or cannot be written.
        ResourceError: memory or disk does not suffice.
        ResumeError: unfinished work of other settings lies where this would be written.
        EstimationError: the self-check failed, or a gradient is not finite.
        Interrupted: stopped by a signal; the same call goes on.
    """
    settings = FisherSettings(
        model=str(model),
        out=default_output(str(model)) if out is None else Path(out),
        data=DataSettings(str(dataset), subset, split, num_examples, seed, shuffle),
        task=task,
        text_columns=tuple(text_columns),
        label_column=label_column,
        max_length=max_length,
        labels=labels,
        draws=draws,
        per_example=per_example,
        batch_size=batch_size,
        memory=parse_bytes(memory),
        dtype=dtype,
        processes=ProcessSettings(multi_gpu, num_processes, cpu),
        save_every=save_every,
        shard_bytes=parse_bytes(shard_size),
        overwrite=overwrite,
        progress=progress,
    )
    return estimate(settings, dry_run=dry_run)


def estimate(settings: FisherSettings, *, dry_run: bool = False) -> dict[str, Any]:
    """`estimate_fisher` with its arguments as one value."""
    from bigmerge.checkpoints.checkpoint import open_checkpoint
    from bigmerge.fisher.launching import count_processes, launch
    from bigmerge.fisher.loading import local_directory
    from bigmerge.fisher.run import describe, run
    from bigmerge.processes import joined_world_size

    directory = local_directory(settings.model)
    out = settings.out.resolve()
    if out == directory.resolve() or out in directory.resolve().parents:
        raise UsageError(
            f"{settings.out}: is where the model itself lies",
            hint=f"choose another output, such as {default_output(str(directory))}",
            out=str(settings.out),
        )
    joined = joined_world_size()
    if joined > 1:
        return describe(settings, joined) if dry_run else run(settings)
    weights = open_checkpoint(directory)
    elements = sum(spec.numel for spec in weights.tensors.values())
    count, cpu = count_processes(settings.processes, weights.nbytes + 4 * elements + settings.memory)
    if dry_run:
        return describe(settings, count)
    return launch(settings, count, cpu=cpu) if count > 1 else run(settings)


def default_output(model: str) -> Path:
    """`MODEL-fisher` beside a model directory.

    Raises:
        UsageError: the model is no local directory.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        raise UsageError(
            f"{model}: is no local directory, so there is no place beside it for the Fisher",
            hint="say where to write it with --output",
        )
    path = path.resolve() if path.name in {"", ".", ".."} else path
    return path.with_name(path.name + "-fisher")
