"""What is written once all tensors are stored: companion files, the manifest and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from bigmerge.merging.alignment import Merged
from bigmerge.merging.card import model_card
from bigmerge.merging.companions import copy_companions
from bigmerge.merging.plan import Plan
from bigmerge.merging.records import StepRecords
from bigmerge.storage.manifest import write_manifest
from bigmerge.storage.writing import write_text


def finish(plan: Plan, records: StepRecords, output: Path) -> None:
    """Complete `output`. Nothing written here depends on when, where or how fast the merge ran.

    Raises:
        OutputError: the disk refuses.
    """
    sources = _sources(plan, records)
    names = copy_companions(plan.recipe, output)
    write_text(output / "README.md", model_card(plan, sources))
    write_manifest(
        output,
        tensors={
            entry.name: {
                "dtype": plan.dtypes[number],
                "shape": list(plan.layout.tensors[entry.name][1]),
                "digest": records.output_digest(number),
                "origin": "merged" if isinstance(entry, Merged) else f"target: {entry.reason}",
            }
            for number, entry in enumerate(plan.tensors)
        },
        companions=[*names, "README.md"],
        facts={
            "kind": "merge",
            "recipe": plan.recipe.describe(),
            "sources": sources,
            "dropped": dict(plan.alignment.dropped),
            "warnings": list(plan.alignment.warnings),
        },
    )


def _sources(plan: Plan, records: StepRecords) -> list[dict[str, Any]]:
    """Each model with the digest over everything that was read of it for merged tensors."""
    models = len(plan.recipe.sources)
    kinds = sorted(plan.recipe.method.companions)
    columns = models * (1 + len(kinds)) + (plan.recipe.base is not None)
    digests = [xxhash.xxh3_128() for _ in range(columns)]
    numbers = {entry.name: number for number, entry in enumerate(plan.tensors)}
    for entry in plan.alignment.merged:
        for column in range(columns):
            line = f"{entry.name}\0{records.input_digest(numbers[entry.name], column)}\n"
            digests[column].update(line.encode())
    described = []
    for number, source in enumerate(plan.recipe.sources):
        row: dict[str, Any] = {
            "name": source.label,
            "weight": source.weight,
            "fingerprint": source.checkpoint.fingerprint(),
            "content": digests[number].hexdigest(),
        }
        for position, kind in enumerate(kinds):
            row[kind] = {"content": digests[models * (1 + position) + number].hexdigest()}
        described.append(row)
    if plan.recipe.base is not None:
        described.append(
            {
                "name": plan.recipe.base_label,
                "role": "base",
                "weight": plan.recipe.scale,
                "fingerprint": plan.recipe.base.fingerprint(),
                "content": digests[-1].hexdigest(),
            }
        )
    return described
