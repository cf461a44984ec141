"""Real processes: started by the command or by a launcher, interrupted, killed, taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import rows, save_bert, save_csv, save_llama

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_bert(root / "bert")
    save_llama(root / "llama")
    save_csv(root / "data.csv", rows(31))
    save_csv(root / "many.csv", rows(800))
    return root


def command(models, model, out, *options, data="data.csv"):
    fixed = ["--dataset", str(models / data), "-o", str(out), "--cpu", "--json"]
    return [sys.executable, "-m", "bigmerge", "fisher", str(models / model), *fixed, *options]


def run(*arguments, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, **options), capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )


def fisher(out: Path) -> dict[str, torch.Tensor]:
    return {n: value for n, value in load_file(out / "model.safetensors").items() if "key.bias" not in n}


def assert_same(first: Path, second: Path) -> None:
    one, other = fisher(first), fisher(second)
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=2e-4, atol=1e-7 + 1e-5 * float(value.max()))


def in_process(models, model, out, **options) -> dict:
    import bigmerge

    return bigmerge.estimate_fisher(
        models / model, out, dataset=models / "data.csv", cpu=True, progress=False, **options
    )


def test_two_processes_give_what_one_gives(models, tmp_path):
    single = in_process(models, "bert", tmp_path / "one", labels="sampled")
    done = run(models, "bert", tmp_path / "two", "--labels", "sampled", "--num-processes", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # once, and nothing else
    assert result["processes"] == 2
    assert result["examples"] == single["examples"] == 31
    for key in ("tokens", "dataset", "model_fingerprint", "examples", "labels", "engine"):
        assert result["fisher"][key] == single["fisher"][key]
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_an_error_in_every_process_is_one_error(models, tmp_path):
    done = run(models, "bert", tmp_path / "two", "--text-column", "body", "--num-processes", "2")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"] == "DatasetError"
    assert done.stderr.strip().splitlines() == [
        "bigmerge: error: the data set has no column 'body'",
        "  hint: its columns are: text, label",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(models, tmp_path):
    content = rows(31)
    content[17]["label"] = 9
    save_csv(models / "bad.csv", content)
    options = ("--labels", "empirical", "--num-processes", "3")
    done = run(models, "bert", tmp_path / "f", *options, data="bad.csv")
    assert done.returncode == 3
    assert done.stderr.count("row 17: the label 9 is outside") == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_three_processes_and_uneven_shares(models, tmp_path, model):
    in_process(models, model, tmp_path / "one", num_examples=10)
    options = ("--num-examples", "10", "--num-processes", "3", "--batch-size", "2")
    done = run(models, model, tmp_path / "three", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 10
    assert_same(tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
def test_more_processes_than_examples(models, tmp_path):
    in_process(models, "bert", tmp_path / "one", num_examples=2)
    done = run(models, "bert", tmp_path / "three", "--num-examples", "2", "--num-processes", "3")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
def test_multi_gpu_without_gpus_says_so_and_works(models, tmp_path):
    arguments = [word for word in command(models, "bert", tmp_path / "f", "--multi-gpu") if word != "--cpu"]
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "NO GPU WAS FOUND" in done.stderr
    assert json.loads(done.stdout)["processes"] == len(os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_launched_processes_join(models, tmp_path, launcher):
    in_process(models, "bert", tmp_path / "one")
    if launcher.startswith("torch"):
        start = ["--standalone", "--nproc-per-node=2", "-m"]
    else:
        start = ["--multi_gpu", "--num_processes=2", "--main_process_port=0", "--num_machines=1"]
        start += ["--mixed_precision=no", "--dynamo_backend=no", "--module"]
    arguments = command(models, "bert", tmp_path / "f", "--quiet")[2:]
    done = subprocess.run(
        [sys.executable, "-m", launcher, *start, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    assert_same(tmp_path / "one", tmp_path / "f")
    bad = [sys.executable, "-m", launcher, *start, *arguments, "--overwrite", "--text-column", "body"]
    failed = subprocess.run(bad, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert failed.returncode != 0
    assert failed.stderr.count("the data set has no column 'body'") == 1


# -- interruption ----------------------------------------------------------------------------------------


def start(models, out, processes, *options):
    arguments = command(models, "bert", out, "--num-processes", str(processes), *options, data="many.csv")
    fixed = ["--save-every", "0", "--per-example", "loop", "--num-examples", "800", "--quiet"]
    return [*arguments, *fixed]


def children(process: subprocess.Popen) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "bigmerge.fisher.worker" in " ".join(child.cmdline())
    ]


def wait_for_saved(process: subprocess.Popen, out: Path, processes: int) -> list[psutil.Process]:
    """Wait until every process has saved something; the worker processes."""
    state = out.with_name(out.name + ".partial") / "state"
    for _ in range(1200):
        if process.poll() is not None:
            raise AssertionError(f"ended too early: {process.communicate()}")
        if len(list(state.glob("sums-*.safetensors"))) >= processes:
            return children(process)
        time.sleep(0.05)
    raise AssertionError("nothing was saved within a minute")


def interrupt(arguments, out, processes, stop) -> tuple[int, str, list[psutil.Process]]:
    """Start, wait for the first saves, call `stop` with the process and its workers; exit code, stderr."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        workers = wait_for_saved(process, out, processes)
        stop(process, workers)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    return process.returncode, stderr, workers


def complete(arguments) -> dict:
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """Uninterrupted runs to compare with, one for each number of processes."""
    root = tmp_path_factory.mktemp("whole")
    made: dict[int, Path] = {}

    def make(processes: int) -> Path:
        if processes not in made:
            made[processes] = root / str(processes)
            complete(start(models, made[processes], processes))
        return made[processes]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_and_the_run_goes_on(models, tmp_path, whole, number):
    out = tmp_path / "f"
    code, stderr, workers = interrupt(
        start(models, out, 2), out, 2, lambda process, _: process.send_signal(number)
    )
    assert code == 130
    assert len(workers) == 2
    assert stderr.count("interrupted") == 1
    assert "Traceback" not in stderr
    assert not out.exists()
    result = complete(start(models, out, 2))
    assert 0 < result["resumed_examples"] < 800
    assert result["examples"] == 800
    name = "model.safetensors"
    assert (out / name).read_bytes() == (whole(2) / name).read_bytes()


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_goes_on_with_another_number(models, tmp_path, whole):
    out = tmp_path / "f"
    code, stderr, _ = interrupt(start(models, out, 2), out, 2, lambda _, workers: workers[0].kill())
    assert code == 8
    assert "was killed (SIGKILL)" in stderr
    result = complete(start(models, out, 1))
    assert 0 < result["resumed_examples"] < 800
    assert_same(whole(2), out)


@pytest.mark.slow
def test_kill_9_of_everything(models, tmp_path, whole):
    out = tmp_path / "f"

    def kill(process, workers):
        process.kill()
        for worker in workers:
            worker.kill()

    code, _, _ = interrupt(start(models, out, 2), out, 2, kill)
    assert code == -signal.SIGKILL
    assert complete(start(models, out, 2))["resumed_examples"] > 0
    name = "model.safetensors"
    assert (out / name).read_bytes() == (whole(2) / name).read_bytes()


@pytest.mark.slow
def test_workers_do_not_outlive_their_launcher(models, tmp_path):
    out = tmp_path / "f"
    code, _, workers = interrupt(start(models, out, 2), out, 2, lambda process, _: process.kill())
    assert code == -signal.SIGKILL
    assert len(workers) == 2  # and `interrupt` has seen them end
    assert not out.exists()
    assert (out.with_name("f.partial") / "state").is_dir()
