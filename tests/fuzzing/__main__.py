"""The same attempts led by coverage: `python -m tests.fuzzing header|index [libFuzzer's options and corpora]`.

Needs atheris (`pip install atheris`). It goes on until something is found, it is stopped, or for `-runs=N` inputs.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["bigmerge.checkpoints"]):
    import bigmerge.checkpoints.arguments
    import bigmerge.checkpoints.checkpoint
    import bigmerge.checkpoints.header  # noqa: F401

from tests.fuzzing import targets

_BETWEEN = b"\0|\0"
_NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
_HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"format":"pt"}}'
_INDEX = json.dumps({"metadata": {}, "weight_map": {"a": _NAMES[0], "b": _NAMES[1]}}).encode()
#: what the fuzzer begins with
_SEEDS = {
    "header": [_HEADER + _BETWEEN + bytes(8), b"{}" + _BETWEEN],
    "index": [_INDEX + _BETWEEN + _HEADER + _BETWEEN + _HEADER.replace(b'"a"', b'"b"')],
}


def _file(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def main() -> None:
    """Fuzz the target that the first argument names."""
    kind = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as name:
        root, seeds = Path(name) / "root", Path(name) / "seeds"
        root.mkdir()
        seeds.mkdir()
        targets.prepare(root)
        for number, seed in enumerate(_SEEDS[kind]):
            (seeds / str(number)).write_bytes(seed)

        def header(raw: bytes) -> None:
            # The length is right more often than chance would have it.
            text, _, data = raw.partition(_BETWEEN)
            targets.check_header(root, _file(text, data) if _BETWEEN in raw else raw)

        def index(raw: bytes) -> None:
            text, *headers = raw.split(_BETWEEN)
            files = {name: _file(header, bytes(8)) for name, header in zip(_NAMES, headers, strict=False)}
            targets.check_index(root, {"model.safetensors.index.json": text, **files})

        atheris.Setup([*sys.argv, str(seeds)], {"header": header, "index": index}[kind])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
