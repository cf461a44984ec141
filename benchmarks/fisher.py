"""Per-example squared gradients beside a plain training step, and beside the loop everyone can write.

    python -m benchmarks.fisher [--hidden 256] [--runs 5] [--json FILE]

BERT- and Llama-shaped models, one thread, one label per example. "plain" is forward and backward of the same
batch; "batch of one" runs examples alone and squares `.grad`. Every way runs in a process of its own, runs
alternate, and medians are printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring import Runs, record, run, save, surroundings, table

WAYS = ("plain", "batch of one", "loop", "hooks")
VOCABULARY = 2000


def main() -> None:
    """Measure and print one table; write it as JSON on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shapes", default="64x16,512x4", help="tokens x examples, comma-separated")
    parser.add_argument("--runs", type=int, default=3, help="processes per way, alternated (default: 3)")
    parser.add_argument("--json", type=Path, default=None, help="write the report here")
    parser.add_argument(
        "--one", nargs=4, metavar=("MODEL", "WAY", "TOKENS", "EXAMPLES"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.one:
        model, way, tokens, examples = arguments.one
        measure_one(model, way, int(tokens), int(examples), arguments.hidden, arguments.layers)
        return

    cases = [
        (model, *map(int, shape.split("x")))
        for model in ("bert", "llama")
        for shape in arguments.shapes.split(",")
    ]
    runs: dict[tuple[str, int, int], dict[str, Runs]] = {case: {} for case in cases}
    extra: dict[tuple[str, int, int], dict[str, list[float]]] = {case: {} for case in cases}
    for number in range(arguments.runs):
        for case in cases:
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                print(f"run {number + 1}: {case[0]}, {case[1]} tokens x {case[2]}, {way}", file=sys.stderr)
                command = [sys.executable, "-m", "benchmarks.fisher", "--hidden", str(arguments.hidden)]
                command += [
                    "--layers",
                    str(arguments.layers),
                    "--one",
                    case[0],
                    way,
                    str(case[1]),
                    str(case[2]),
                ]
                found: dict[str, float] = {}

                def seconds(text: str, found: dict[str, float] = found) -> float:
                    found.update(json.loads(text))
                    return found["seconds"]

                single = {"OMP_NUM_THREADS": "1"}
                record(runs[case].setdefault(way, Runs()), run(command, inner=seconds, environment=single))
                extra[case].setdefault(way, []).append(found["peak_bytes"])

    rows = []
    for case in cases:
        plain = runs[case]["plain"].seconds
        single = runs[case]["batch of one"].seconds
        for way in WAYS:
            seconds = runs[case][way].seconds
            rows.append(
                [
                    f"{case[0]}, {case[1]} tokens x {case[2]}: {way}",
                    f"{1000 * seconds / case[2]:.2f}",
                    f"{seconds / plain:.2f}",
                    f"{single / seconds:.2f}",
                    f"{max(extra[case][way]) / 2**20:.0f}",
                ]
            )
    print(
        f"hidden {arguments.hidden}, {arguments.layers} layers, float32, one thread; medians of {arguments.runs}"
    )
    print(table(["", "ms/example", "× plain", "faster than batch of one", "peak MiB above model"], rows))
    save(
        arguments.json,
        {
            **surroundings(),
            "hidden": arguments.hidden,
            "layers": arguments.layers,
            "rows": {
                row[0]: dict(zip(("ms", "to_plain", "speedup", "peak"), row[1:], strict=True)) for row in rows
            },
        },
    )


def measure_one(kind: str, way: str, tokens: int, examples: int, hidden: int, layers: int) -> None:
    """Time one way on one model in this process; prints JSON."""
    import torch

    from bigmerge.fisher.batch import Batch
    from bigmerge.fisher.engines.base import ENGINES
    from bigmerge.fisher.labels.base import LABELS

    torch.set_num_threads(1)
    model, score = build(kind, tokens, hidden, layers)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (examples, tokens), generator=generator)
    lengths = torch.randint(tokens // 2, tokens + 1, (examples,), generator=generator)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    batch = Batch(
        tuple(range(examples)),
        {"input_ids": ids * mask, "attention_mask": mask},
        torch.zeros(examples, 1, dtype=torch.int64),
    )
    labels = LABELS.get("sampled")(seed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def backward(part: Batch) -> None:
        scores = score(model, part)
        for column in labels.columns(scores, part.ids):
            scores.logits.backward(column.to(scores.logits.dtype))

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        backward(batch)

    def alone() -> None:
        for n in range(examples):
            model.zero_grad(set_to_none=True)
            backward(batch.select(n, n + 1))
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums[name].addcmul_(parameter.grad, parameter.grad)

    work: Callable[[], Any]
    if way == "plain":
        work = plain
    elif way == "batch of one":
        sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        work = alone
    else:
        engine = ENGINES.get(way)(model, labels, score, memory=1 << 30)
        work = lambda: engine.add(batch)  # noqa: E731
    work()
    times = []
    for _ in range(5):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": statistics.median(times), "peak_bytes": peak * 1024}))


def build(kind: str, tokens: int, hidden: int, layers: int) -> tuple[Any, Any]:
    """A randomly initialised model in evaluation mode, and how it is scored."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    from bigmerge.fisher.batch import Batch, Scores

    torch.manual_seed(0)
    heads = max(1, hidden // 64)
    if kind == "bert":
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=tokens,
            num_labels=3,
        )
        model: Any = BertForSequenceClassification(config)
    else:
        llama = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            intermediate_size=11 * hidden // 4,
            max_position_embeddings=tokens,
        )
        model = LlamaForCausalLM(llama)

    def score(model: Any, batch: Batch) -> Scores:
        if kind == "bert":
            logits = model(**batch.inputs).logits.unsqueeze(1)
            scored = torch.ones(logits.shape[:2], dtype=torch.bool)
        else:
            logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
            scored = batch.inputs["attention_mask"][:, 1:].bool()
        return Scores(logits, scored, batch.targets)

    return model.eval(), score


if __name__ == "__main__":
    main()
