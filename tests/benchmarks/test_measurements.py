"""The benchmarks' own parts: checkpoints are loadable, the floor moves the bytes it claims, tables line up."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import torch

import bigmerge
from benchmarks import floor
from benchmarks.checkpoints import LlamaShape, write_llama
from benchmarks.measuring import Runs, record, run, table
from tests.conftest import read_checkpoint

SHAPE = LlamaShape(layers=1, hidden=64, intermediate=96, vocabulary=50, heads=4, key_value_heads=2)


def test_generated_checkpoints_are_seeded_and_load(tmp_path):
    from transformers import AutoModelForCausalLM

    one = write_llama(tmp_path / "one", SHAPE, seed=1)
    again = write_llama(tmp_path / "again", SHAPE, seed=1)
    other = write_llama(tmp_path / "other", SHAPE, seed=2)
    assert all(torch.equal(read_checkpoint(one)[n], t) for n, t in read_checkpoint(again).items())
    assert not torch.equal(read_checkpoint(one)["lm_head.weight"], read_checkpoint(other)["lm_head.weight"])
    model, info = AutoModelForCausalLM.from_pretrained(one, output_loading_info=True)
    assert not info["missing_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == SHAPE.parameters


def test_generated_fishers_merge(tmp_path):
    for n in range(2):
        write_llama(tmp_path / f"m{n}", SHAPE, seed=n)
        write_llama(tmp_path / f"m{n}-fisher", SHAPE, seed=n + 9, dtype="F32", fisher=True)
    result = bigmerge.merge(sorted(tmp_path.iterdir()), tmp_path / "out")
    assert result.recipe["method"] == "fisher"


@pytest.mark.parametrize("direct", [False, True])
def test_the_floor_reads_everything_and_writes_as_much_as_asked(tmp_path, capsys, monkeypatch, direct):
    read = []
    original = floor.os.preadv

    def preadv(descriptor, buffers, offset):
        count = original(descriptor, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(floor.os, "preadv", preadv)
    models = [write_llama(tmp_path / f"m{n}", SHAPE, seed=n) for n in range(2)]
    sizes = [file.stat().st_size for model in models for file in model.glob("*.safetensors")]
    try:
        floor.main(2, sizes[0], str(tmp_path / "out"), [str(model) for model in models], direct=direct)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        pytest.skip("no direct reads here")
    assert sum(read) == sum(sizes)
    assert (tmp_path / "out").stat().st_size == sizes[0] // 4096 * 4096, "whole blocks"
    assert float(capsys.readouterr().out) > 0


@pytest.mark.slow
def test_fisher_benchmark_runs_every_way():
    from benchmarks.fisher import WAYS

    for way in WAYS:
        command = [
            sys.executable,
            "-m",
            "benchmarks.fisher",
            "--hidden",
            "64",
            "--layers",
            "1",
            "--one",
            "bert",
            way,
        ]
        done = subprocess.run([*command, "8", "2"], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["seconds"] > 0


def test_runs_keep_the_inner_seconds_and_the_peak():
    runs = Runs()
    for _ in range(3):
        record(runs, run([sys.executable, "-c", "print(1.5)"], inner=float))
    assert runs.seconds == 1.5
    assert 1 << 20 < runs.peak_bytes < 1 << 30


def test_tables_line_up():
    lines = table(["", "a"], [["first", "1"], ["x", "1000"]]).splitlines()
    assert lines == ["          a", "-----  ----", "first     1", "x      1000"]
