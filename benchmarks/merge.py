"""`bigmerge merge` beside the disk's own limit and the usual way in memory.

    python -m benchmarks.merge [--layers 22] [--runs 3] [--json FILE]

Llama-shaped checkpoints in bfloat16 with float32 Fishers, cold page cache, alternated runs, medians. "floor"
reads all inputs and writes and syncs the output with the same number of threads and no arithmetic.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from benchmarks.checkpoints import LlamaShape, write_llama
from benchmarks.measuring import Runs, bare_peak, drop_from_cache, record, run, save, surroundings, table


def main() -> None:
    """Measure and print one table; write it as JSON on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=6, help="6 is 0.4 B parameters, 22 is 1.1 B (default: 6)"
    )
    parser.add_argument("--runs", type=int, default=3, help="alternated runs of everything (default: 3)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=Path(".bench"), help="where checkpoints are made")
    parser.add_argument("--json", type=Path, default=None, help="write the report here")
    arguments = parser.parse_args()

    shape = LlamaShape(layers=arguments.layers)
    root = arguments.directory / f"llama-{arguments.layers}"
    print(f"making checkpoints of {shape.parameters / 1e9:.2f} B parameters in {root}", file=sys.stderr)
    models = [write_llama(root / f"m{n}", shape, seed=n) for n in range(3)]
    for n in range(2):
        write_llama(root / f"m{n}-fisher", shape, seed=100 + n, dtype="F32", fisher=True)
    fishers = [root / f"m{n}-fisher" for n in range(2)]
    cases = {"linear": models, "fisher": [models[0], models[1], *fishers]}
    out = root / "out"
    output_bytes = sum(file.stat().st_size for file in models[0].glob("*.safetensors"))

    def clean() -> None:
        for path in (out, Path(f"{out}.partial")):
            shutil.rmtree(path, ignore_errors=True)
        (root / "floor.out").unlink(missing_ok=True)

    def floor(inputs: list[Path]) -> tuple[float, float | None, int]:
        command = [sys.executable, "-m", "benchmarks.floor", str(arguments.workers), str(output_bytes)]
        return run([*command, str(root / "floor.out"), *map(str, inputs)], inner=float)

    def bigmerge(method: str, inputs: list[Path], *extra: str) -> tuple[float, float | None, int]:
        command = [sys.executable, "-m", "bigmerge", "merge", "--json", "-q", "-m", method]
        # Generated Fishers record no sums; normalising would add a measuring pass that real ones do not need.
        normalize = ["--fisher-normalize", "none"] if method == "fisher" else []
        command += [*normalize, "--workers", str(arguments.workers), "-o", str(out), *extra]
        return run([*command, *map(str, inputs)], inner=lambda text: float(json.loads(text)["seconds"]))

    runs: dict[str, Runs] = {}
    for number in range(arguments.runs):
        for method, inputs in cases.items():
            todo = {
                f"{method}: floor": lambda inputs=inputs: floor(inputs),
                f"{method}: bigmerge": lambda inputs=inputs, method=method: bigmerge(method, inputs),
                f"{method}: bigmerge --memory 64MiB": lambda inputs=inputs, method=method: bigmerge(
                    method, inputs, "--memory", "64MiB"
                ),
            }
            if method == "linear":
                todo["linear: transformers, in memory"] = lambda inputs=inputs: run(
                    [sys.executable, "-m", "benchmarks.average_in_memory", str(out), *map(str, inputs)],
                    inner=float,
                )
            names = list(todo) if number % 2 == 0 else list(reversed(todo))
            for name in names:
                print(f"run {number + 1}: {name}", file=sys.stderr)
                clean()
                drop_from_cache(inputs)
                record(runs.setdefault(name, Runs()), todo[name]())
    clean()

    bare = bare_peak()
    rows = []
    for name in sorted(runs, key=lambda name: (name.split(":")[0] != "linear", "floor" not in name, name)):
        method = name.split(":")[0]
        seconds = runs[name].seconds
        moved = (
            sum(f.stat().st_size for path in cases[method] for f in path.glob("*.safetensors")) + output_bytes
        )
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{seconds / runs[f'{method}: floor'].seconds:.2f}",
                f"{moved / seconds / 1e9:.2f}",
                f"{max(0, runs[name].peak_bytes - bare) / 2**20:.0f}" if "floor" not in name else "",
            ]
        )
    print(
        f"{shape.parameters / 1e9:.2f} B parameters, bf16, float32 Fishers, cold cache, {arguments.workers} workers,"
    )
    print(f"medians of {arguments.runs} alternated runs; memory above the interpreter with torch")
    print(table(["", "seconds", "× floor", "GB/s moved", "peak MiB"], rows))
    report = {
        **surroundings(),
        "parameters": shape.parameters,
        "workers": arguments.workers,
        "bare_peak_bytes": bare,
        "rows": {name: value.as_json() for name, value in runs.items()},
        "ratio_to_floor": {row[0]: float(row[2]) for row in rows},
    }
    save(arguments.json, report)


if __name__ == "__main__":
    main()
