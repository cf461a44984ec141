"""What one Fisher estimation is asked to do: plain values that travel to every process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigmerge.errors import UsageError

#: storage dtypes of a Fisher; float16 is not among them, since squares of gradients underflow in it
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class DataSettings:
    """Which rows are read.

    Attributes:
        dataset: a file (csv, tsv, json, jsonl, parquet, txt), a directory (saved data set or data files), or a
            name on the Hugging Face hub.
        subset: configuration of a hub data set that has several.
        split: split to read; for a single file it is that file.
        num_examples: how many rows to take.
        seed: keys the permutation whose first rows are taken.
        shuffle: False takes the first rows as they come.
    """

    dataset: str
    subset: str | None = None
    split: str = "train"
    num_examples: int = 4096
    seed: int = 0
    shuffle: bool = True

    @property
    def short_name(self) -> str:
        """The name to record: of a file or directory without the way there, of the hub in full."""
        path = Path(self.dataset).expanduser()
        return path.resolve().name if path.exists() else self.dataset


@dataclass(frozen=True)
class ProcessSettings:
    """How many processes work, and on what.

    Attributes:
        multi_gpu: one process per GPU; where there is none, one CPU process per core.
        num_processes: this many; None: one, or what `multi_gpu` says.
        cpu: stay off the GPUs.
    """

    multi_gpu: bool = False
    num_processes: int | None = None
    cpu: bool = False


@dataclass(frozen=True)
class FisherSettings:
    """Everything about one estimation.

    Attributes:
        model: model directory or hub name.
        out: directory to write.
        data: which rows.
        task: name of the task, or "auto": found from the model's architecture.
        text_columns: see `TaskSettings`.
        label_column: see `TaskSettings`.
        max_length: longest input in tokens; None: what the model can take.
        labels: name of the label source, or "auto": the task's default.
        draws: labels drawn per example by a source that draws.
        per_example: name of the engine, or "auto".
        batch_size: most examples per batch; None: as many as `memory` suggests.
        memory: bytes for activations and per-example blocks, beyond the model and its sums.
        dtype: storage dtype of the result.
        processes: how many processes.
        save_every: seconds between saved states; 0 saves after every batch.
        shard_bytes: largest output file.
        overwrite: replace an existing `out` when the new one is complete.
        progress: show a progress bar.
    """

    model: str
    out: Path
    data: DataSettings
    task: str = "auto"
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    max_length: int | None = None
    labels: str = "auto"
    draws: int = 1
    per_example: str = "auto"
    batch_size: int | None = None
    memory: int = 1 << 30
    dtype: str = "float32"
    processes: ProcessSettings = field(default_factory=ProcessSettings)
    save_every: float = 300.0
    shard_bytes: int = 5_000_000_000
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything.

        Raises:
            UsageError: names the value.
        """
        if self.dtype not in DTYPES:
            raise UsageError(
                f"a Fisher cannot be stored as {self.dtype!r}",
                hint=f"choose one of: {', '.join(DTYPES)}",
                dtype=self.dtype,
            )
        for name, value, least in (
            ("the number of examples", self.data.num_examples, 1),
            ("the number of draws", self.draws, 1),
            ("the batch size", self.batch_size, 1),
            ("the number of processes", self.processes.num_processes, 1),
            ("the maximal length", self.max_length, 1),
            ("the time between saved states", self.save_every, 0),
            ("the seed", self.data.seed, 0),
            ("the memory", self.memory, 1),
            ("the shard size", self.shard_bytes, 1),
        ):
            if value is not None and not value >= least:
                raise UsageError(f"{name} must be at least {least}, not {value}", value=value)

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        value = dataclasses.asdict(self)
        value["out"] = str(self.out)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FisherSettings:
        """The settings that `as_json` described."""
        fields = dict(value)
        fields["out"] = Path(fields["out"])
        fields["data"] = DataSettings(**fields["data"])
        fields["processes"] = ProcessSettings(**fields["processes"])
        fields["text_columns"] = tuple(fields["text_columns"])
        return cls(**fields)
