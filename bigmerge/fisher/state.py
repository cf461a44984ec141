"""Sums saved while an estimate runs, so that an interrupted one goes on instead of starting again.

OUT.partial/state/generation.json      how the examples were divided, and those finished before that
OUT.partial/state/sums-G-R.safetensors what process R has added up in generation G, and from which examples

Sums are additive, so whoever comes back may be another number of processes: they take up the old files among
themselves and divide what remains anew, which is a new generation. With the same division every
process repeats its own plan from where it stopped, and the result has the same bits as an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigmerge.checkpoints.layout import lay_out
from bigmerge.errors import ResumeError
from bigmerge.processes import Group
from bigmerge.storage.staging import how_to_start_again
from bigmerge.storage.writing import CheckpointWriter, sync_directory, write_json

logger = logging.getLogger("bigmerge.fisher")

_GENERATION = "generation.json"
_FINISHED = "bigmerge.finished"
_TOKENS = "bigmerge.tokens"
#: saving may take at most this share of the time
_SAVING_SHARE = 0.05


@dataclass
class Progress:
    """What is in a process's sums.

    Attributes:
        finished: examples added in this generation.
        tokens: positions scored, those of earlier generations that this process took over included.
    """

    finished: list[int] = field(default_factory=list)
    tokens: int = 0


class SavedState:
    """The saved sums of all processes of one estimate.

    Args:
        directory: where they are.
        group: the processes.
        division: what the division of examples into processes and batches depends on; JSON-able.
        sums: float32 sums of this process, by parameter; filled by `take_up`, read by `save`.
        every: seconds between saves; 0 for every batch; None never saves.
    """

    def __init__(
        self,
        directory: Path,
        group: Group,
        division: Mapping[str, Any],
        sums: Mapping[str, torch.Tensor],
        every: float | None,
    ) -> None:
        self._directory = directory
        self._group = group
        self._division = {**division, "processes": group.world}
        self._sums = sums
        self._every = every
        self._generation = 0
        self._saved_at = time.monotonic()
        self._cost = 0.0
        self._saved_examples = 0

    def take_up(self) -> tuple[frozenset[int], Progress]:
        """Fill the sums with what earlier runs finished. Every process calls this together.

        Returns:
            The examples that were finished before this generation, and this process's own progress in it.

        Raises:
            ResumeError: a file is not what it should be.
        """
        found = self._group.from_main(self._read_generation)
        if found is None:
            self._group.from_main(lambda: self._write_generation(0, ()))
            return frozenset(), Progress()
        self._generation = found["generation"]
        if found["division"] == self._division:
            progress = self._group.together(lambda: self._load(self._generation, self._group.rank))
            self._saved_examples = len(progress.finished)
            return frozenset(found["carried"]), progress
        return self._new_generation(found)

    @property
    def saves(self) -> bool:
        """Whether anything is saved at all."""
        return self._every is not None

    def due(self) -> bool:
        """Whether it is time to save."""
        if self._every is None:
            return False
        if self._every == 0:
            return True
        return time.monotonic() - self._saved_at >= max(self._every, self._cost / _SAVING_SHARE)

    def save(self, progress: Progress) -> None:
        """Save this process's sums, replacing its last save at once and durably.

        Raises:
            OutputError: the disk is full or refuses.
        """
        if self._every is None or len(progress.finished) == self._saved_examples:
            return
        started = time.monotonic()
        self._write(progress)
        self._saved_examples = len(progress.finished)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    # -- generations -------------------------------------------------------------------------------------

    def _new_generation(self, found: Mapping[str, Any]) -> tuple[frozenset[int], Progress]:
        old, processes = found["generation"], found["division"]["processes"]

        def adopt() -> tuple[list[int], int]:
            adopted = Progress()
            for rank in range(self._group.rank, processes, self._group.world):
                part = self._load(old, rank)
                adopted.finished += part.finished
                adopted.tokens += part.tokens
            self._generation = old + 1
            self._directory.mkdir(parents=True, exist_ok=True)
            self._write(Progress([], adopted.tokens))
            return adopted.finished, adopted.tokens

        finished, tokens = self._group.together(adopt)
        carried = list(found["carried"])
        for part in self._group.gather(finished):
            carried += part
        if len(set(carried)) != len(carried):
            raise ResumeError(
                f"{self._directory}: examples are counted twice in the saved sums",
                hint=how_to_start_again(self._directory.parent),
            )
        # All files of the new generation exist by now; from this write on they are the ones that count.
        self._group.from_main(lambda: self._write_generation(old + 1, carried))
        self._group.from_main(lambda: self._remove(old))
        return frozenset(carried), Progress([], tokens)

    def _read_generation(self) -> dict[str, Any] | None:
        path = self._directory / _GENERATION
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._unusable(path, error) from error
        return found

    def _write_generation(self, number: int, carried: Iterable[int]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        write_json(
            self._directory / _GENERATION,
            {"generation": number, "division": self._division, "carried": sorted(carried)},
        )
        sync_directory(self._directory)

    def _remove(self, generation: int) -> None:
        for path in self._directory.glob(f"sums-{generation}-*"):
            path.unlink()

    # -- files -------------------------------------------------------------------------------------------

    def _file(self, generation: int, rank: int) -> Path:
        return self._directory / f"sums-{generation}-{rank}.safetensors"

    def _write(self, progress: Progress) -> None:
        finished = torch.tensor(progress.finished, dtype=torch.int64)
        content = {name: ("F32", tuple(value.shape)) for name, value in self._sums.items()}
        content[_FINISHED] = ("I64", tuple(finished.shape))
        layout = lay_out(content, 1 << 62, metadata={_TOKENS: str(progress.tokens)})
        growing = self._directory / f"saving-{self._group.rank}"
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir()
        with CheckpointWriter(growing, layout) as writer:
            writer.create()
            for name, value in (*self._sums.items(), (_FINISHED, finished)):
                if value.numel():
                    writer.write(name, 0, tensor_bytes(value))
            writer.sync()
        (growing / layout.shards[0].filename).replace(self._file(self._generation, self._group.rank))
        sync_directory(self._directory)
        growing.rmdir()

    def _load(self, generation: int, rank: int) -> Progress:
        """Add the sums in a file to this process's; a process that never saved has none."""
        from safetensors import SafetensorError, safe_open

        path = self._file(generation, rank)
        if not path.exists():
            return Progress()
        try:
            with safe_open(path, framework="pt") as file:
                tokens = int((file.metadata() or {})[_TOKENS])
                finished = file.get_tensor(_FINISHED).tolist()
                for name, value in self._sums.items():
                    value.add_(file.get_tensor(name).to(value.device))
        except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
            raise self._unusable(path, error) from error
        return Progress(finished, tokens)

    def _unusable(self, path: Path, error: Exception) -> ResumeError:
        return ResumeError(
            f"{path}: the saved sums cannot be read ({error})",
            hint=how_to_start_again(self._directory.parent),
            file=str(path),
        )


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor with at least one element, C-contiguous; copied only where they must be."""
    flat = tensor.detach().reshape(-1).cpu().contiguous()
    return flat.view(torch.uint8).numpy().data
