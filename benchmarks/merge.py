"""The report on `bigmerge merge`: speed beside the disk's own limit, memory, and peers.

    python -m benchmarks.merge [--layers 22] [--runs 3] [--only cold,memory,...] [--mergekit PATH] [--json FILE]

Llama-shaped checkpoints in bfloat16 with float32 Fishers, in two shards or more, made from seeded random values.
Everything compared is run alternately, and medians are compared. "floor" reads all inputs and writes and syncs the
output with the same number of threads and no arithmetic. With --json, rows that are measured replace those in
the file and the others stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from benchmarks import merge_rows
from benchmarks.measuring import save, surroundings, table
from benchmarks.merge_rows import Row, Setting


def main() -> None:
    """Measure the chosen rows, print them as a table and write them as JSON on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=6, help="6 is 0.4 B parameters, 22 is 1.1 B (default: 6)"
    )
    parser.add_argument("--runs", type=int, default=3, help="alternated runs of everything (default: 3)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--only", default=",".join(merge_rows.GROUPS), help="groups of rows, separated by commas"
    )
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="the mergekit-yaml command")
    parser.add_argument("--directory", type=Path, default=Path(".bench"), help="where checkpoints are made")
    parser.add_argument("--json", type=Path, default=None, help="write the report here")
    arguments = parser.parse_args()

    wanted = arguments.only.split(",")
    unknown = [name for name in wanted if name not in merge_rows.GROUPS]
    if unknown:
        parser.error(f"no such rows: {', '.join(unknown)}; there are {', '.join(merge_rows.GROUPS)}")
    setting = Setting(
        arguments.directory, arguments.layers, arguments.runs, arguments.workers, arguments.mergekit
    )
    rows: list[Row] = []
    for name in wanted:
        print(f"rows: {name}", file=sys.stderr)
        rows += merge_rows.GROUPS[name](setting)
        _keep(arguments.json, setting, rows)
    print(f"{setting.shape.parameters / 1e9:.2f} B parameters, bf16, {arguments.workers} workers, medians of "
          f"{arguments.runs} alternated runs")  # fmt: skip
    print(table(["", "reached", "to reach", ""], [row.cells() for row in rows]))


def _keep(path: Path | None, setting: Setting, rows: list[Row]) -> None:
    """Write the rows so far beside those that the file has of other runs."""
    if path is None:
        return
    known = json.loads(path.read_text())["rows"] if path.exists() else {}
    facts = surroundings()
    for row in rows:
        known[row.name] = row.as_json() | {"date": facts["date"], "command": facts["command"]}
    save(path, {**facts, "parameters": setting.shape.parameters, "workers": setting.workers, "rows": known})


if __name__ == "__main__":
    main()
