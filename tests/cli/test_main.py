"""bigmerge.cli: what scripts and people see of every kind of end."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import bigmerge
from bigmerge import errors
from bigmerge.cli import console
from bigmerge.cli.main import main
from bigmerge.storage.staging import Staging
from tests.building import turn_hub_off, write_fisher
from tests.conftest import file_bytes, normal, read_checkpoint, write_checkpoint


def run(*arguments: str | Path) -> int:
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return {"enc.w": normal((4, 5), seed), "enc.b": normal(4, seed + 50)}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with shards/a and shards/b; the hub is off."""
    monkeypatch.chdir(tmp_path)
    turn_hub_off(monkeypatch, tmp_path / "hub cache")
    for number, name in enumerate("ab"):
        write_checkpoint(tmp_path / "shards" / name, tensors(number), config={})
    return tmp_path


def add_fishers(work: Path) -> None:
    for name in "ab":
        values = {key: tensor.square() for key, tensor in tensors(ord(name)).items()}
        write_fisher(work / "shards" / f"{name}-fisher", values, model=work / "shards" / name)


def everything(work: Path) -> list[str]:
    return sorted(f"shards/{path.name}" for path in (work / "shards").iterdir())


Capture = pytest.CaptureFixture[str]


# -- the shell ----------------------------------------------------------------------------------------------


def test_help_names_every_command(capsys: Capture) -> None:
    assert run("--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    for part in ("merge", "fisher", "verify", "inspect", "--version", "--install-completion", "Exit codes"):
        assert part in told
    assert run() == 2, "no command is wrong usage"
    assert "Usage: bigmerge" in "".join(capsys.readouterr())


def test_version(capsys: Capture) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"bigmerge {bigmerge.__version__}\n"


@pytest.mark.parametrize("command", ["merge", "fisher", "verify", "inspect"])
def test_help_of_commands(capsys: Capture, command: str) -> None:
    assert run(command, "--help") == 0
    assert "--json" in capsys.readouterr().out


def test_help_of_merge_shows_the_methods_own_options(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run("merge", "--help") == 0
    told = capsys.readouterr().out
    for part in (
        "--linear-normalize",
        "--no-linear-normalize",
        "--fisher-normalize",
        "--fisher-zero",
        "--fisher-epsilon",
    ):
        assert part in told


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import sys, time; start = time.perf_counter()\n"
        "from bigmerge.cli.main import build_app; build_app()\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "print(time.perf_counter() - start, sorted(heavy))"
    )
    seconds, heavy = [], ""
    for _ in range(3):  # the quickest counts: other work on the machine does not
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        taken, _, heavy = done.stdout.strip().partition(" ")
        seconds.append(float(taken))
    assert heavy == "[]"
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "arguments", [("marge",), ("merge", "--no-such"), ("verify",), ("merge", "--scale", "much")]
)
def test_unknown_words_are_wrong_usage(capsys: Capture, arguments: Sequence[str]) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: bigmerge" in captured.err


def test_python_m_bigmerge() -> None:
    command = [sys.executable, "-m", "bigmerge", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"bigmerge {bigmerge.__version__}\n"


# -- merging ------------------------------------------------------------------------------------------------


def test_merge_just_works(work: Path, capsys: Capture) -> None:
    assert run("merge", *everything(work), "-o", "out") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("out: 2 tensors merged by linear, 0 taken from a\n")
    assert "merging" in captured.err
    found = read_checkpoint(work / "out")
    for name in found:
        assert torch.allclose(found[name], (tensors(0)[name] + tensors(1)[name]) / 2)
    assert run("verify", "out", "--quiet") == 0
    assert "as the manifest says" in capsys.readouterr().out


def test_fisher_is_the_default_with_fishers(work: Path, capsys: Capture) -> None:
    add_fishers(work)
    assert run("merge", *everything(work), "-o", "out", "-q", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    told = json.loads(captured.out)
    assert told["recipe"]["method"] == "fisher"
    assert told["recipe"]["parameters"]["normalize"] == "model"
    assert told["merged"] == 2
    assert told["out"] == "out"


def test_full_control(work: Path, capsys: Capture) -> None:
    add_fishers(work)
    options = [
        "--model", "shards/b", "--fisher", "shards/b-fisher", "--model", "shards/a", "--fisher", "shards/a-fisher",
        "-w", "0.25", "--weight", "4", "--target", "a", "--base", "shards/b", "--scale", "0.5", "--dtype", "bfloat16",
        "--fisher-normalize", "tensor", "--fisher-epsilon", "0.001", "--fisher-zero", "average", "--exclude", "*.b",
        "--shard-size", "1kB", "--memory", "100MiB", "--workers", "1", "-m", "fisher", "-o", "out", "--json", "-q",
    ]  # fmt: skip
    assert run("merge", *options) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert [(model["name"], model["weight"]) for model in recipe["models"]] == [("b", 0.25), ("a", 4)]
    assert recipe["parameters"] == {
        "normalize": "tensor",
        "zero": "average",
        "epsilon": 0.001,
        "floor": "none",
    }
    assert recipe["target"] == "a"
    assert (recipe["base"]["name"], recipe["scale"], recipe["dtype"]) == ("b", 0.5, "BF16")
    assert recipe["selection"]["exclude"] == ["*.b"]
    assert recipe["shard_bytes"] == 1000


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_writes_nothing(work: Path, capsys: Capture, as_json: bool) -> None:
    before = file_bytes(work)
    assert (
        run("merge", *everything(work), "-o", "deep/out", "--dry-run", *(["--json"] if as_json else [])) == 0
    )
    captured = capsys.readouterr()
    if as_json:
        told = json.loads(captured.out)
        assert told["peak_memory_bytes"] <= told["memory_budget_bytes"]
        assert {"read_bytes", "write_bytes", "disk_free_bytes", "seconds_at_1GBps"} <= set(told)
    else:
        assert "2 tensors merged, 0 taken from a" in captured.out
        assert "working memory" in captured.out
    assert file_bytes(work) == before
    assert not (work / "deep").exists()


def test_no_linear_normalize(work: Path, capsys: Capture) -> None:
    assert run("merge", *everything(work), "-o", "out", "-q", "--no-linear-normalize") == 0
    assert torch.allclose(read_checkpoint(work / "out")["enc.w"], tensors(0)["enc.w"] + tensors(1)["enc.w"])


def test_overwrite(work: Path, capsys: Capture) -> None:
    (work / "out").mkdir()
    (work / "out" / "old.safetensors").write_text("old")
    assert run("merge", *everything(work), "-o", "out", "-q") == 4
    assert [path.name for path in (work / "out").iterdir()] == ["old.safetensors"]
    assert run("merge", *everything(work), "-o", "out", "-q", "--overwrite") == 0
    assert not (work / "out" / "old.safetensors").exists()
    assert not (work / "out.partial").exists()


# -- exit codes ---------------------------------------------------------------------------------------------


def other_recipe(work: Path) -> None:
    with Staging(work / "out", {"another": "run"}):
        pass


def existing(work: Path) -> None:
    (work / "out").mkdir()


def reshaped(work: Path) -> None:
    write_checkpoint(work / "shards" / "b", {"enc.w": normal((2, 2), 0), "enc.b": normal(3, 0)})


def damaged(work: Path) -> None:
    (work / "shards" / "b" / "model.safetensors").write_bytes(b"\0" * 7)


ENDS: list[tuple[Any, list[str], int, str, str]] = [
    (None, [], 2, "UsageError", "where should the merged model go?"),
    (None, ["-o", "out.safetensors"], 2, "UsageError", "the output is a directory"),
    (None, ["-o", "out", "--weight", "1"], 2, "UsageError", "1 --weight for 2 models"),
    (None, ["-o", "out", "--method", "magic"], 2, "UsageError", "no merge method called 'magic'"),
    (
        None,
        ["-o", "out", "--fisher-zero", "never"],
        2,
        "UsageError",
        "options of the method 'fisher' were given",
    ),
    (None, ["-o", "out", "shards/c"], 3, "CheckpointError", "shards/c: no such file or directory"),
    (
        None,
        ["-o", "out", "owner/name"],
        3,
        "CheckpointError",
        "owner/name: is neither a path that exists nor",
    ),
    (damaged, ["-o", "out"], 3, "CheckpointError", "model.safetensors: is 7 bytes long"),
    (reshaped, ["-o", "out"], 3, "AlignmentError", "nothing is left to merge"),
    (reshaped, ["-o", "out", "--strict"], 3, "AlignmentError", "2 tensors do not fit together"),
    (existing, ["-o", "out"], 4, "OutputError", "out: exists already"),
    (None, ["-o", "shards/a/config.json/out"], 4, "OutputError", "config.json: is no directory"),
    (None, ["-o", "shards", "--overwrite"], 4, "OutputError", "holds no checkpoint"),
    (None, ["-o", "shards/a", "--overwrite"], 4, "OutputError", "would replace an input"),
    (None, ["-o", "."], 4, "OutputError", "is no name for an output"),
    (None, ["-o", "out", "--memory", "1MiB"], 5, "ResourceError", "of working memory"),
    (other_recipe, ["-o", "out"], 6, "ResumeError", "unfinished work of another run"),
]


@pytest.mark.parametrize(("prepare", "options", "code", "kind", "message"), ENDS)
def test_every_kind_of_error_has_its_exit_code(
    work: Path, capsys: Capture, prepare: Any, options: list[str], code: int, kind: str, message: str
) -> None:
    if prepare:
        prepare(work)
    before = file_bytes(work)
    assert run("merge", "shards/a", "shards/b", *options) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bigmerge: error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert run("merge", "shards/a", "shards/b", *options, "--json") == code
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert set(told) == {"error", "message", "hint", "data"}
    assert told["error"] == kind
    assert getattr(errors, kind).exit_code == code
    assert message in told["message"]
    assert message in captured.err
    assert file_bytes(work) == before, "what is refused has changed nothing"


def test_every_error_has_a_code_of_its_own_kind() -> None:
    codes = {
        "BigmergeError": 1, "UsageError": 2, "InputError": 3, "CheckpointError": 3, "AlignmentError": 3,
        "DatasetError": 3, "OutputError": 4, "ResourceError": 5, "ResumeError": 6, "VerificationError": 7,
        "EstimationError": 8, "Interrupted": 130,
    }  # fmt: skip
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.BigmergeError)
    }
    assert found == codes


# -- verify and inspect -------------------------------------------------------------------------------------


def test_verify(work: Path, capsys: Capture) -> None:
    assert run("merge", *everything(work), "-o", "out", "-q") == 0
    (work / "out" / "README.md").write_text("changed")
    capsys.readouterr()
    assert run("verify", "out", "-q") == 7
    assert capsys.readouterr().out.endswith("NOT as it should be\n  README.md has been changed\n")
    assert run("verify", "out", "--json") == 7
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == ["README.md has been changed"]
    assert run("verify", "shards/a", "-q") == 0
    assert "no bigmerge.json, so contents could not be compared" in capsys.readouterr().out
    assert run("verify", "nothing", "--json") == 3
    assert json.loads(capsys.readouterr().out)["error"] == "CheckpointError"


def test_inspect(work: Path, capsys: Capture) -> None:
    add_fishers(work)
    assert run("inspect", "shards/a") == 0
    assert capsys.readouterr().out.startswith("shards/a: model\n  24 numbers in 2 tensors (2 F32)")
    assert run("inspect", "shards/a", "--tensors") == 0
    assert "enc.w  F32     [4, 5]" in capsys.readouterr().out
    assert run("inspect", "shards/a-fisher", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "fisher"
    assert set(told["layers"]) == {"enc"}
    assert run("inspect", "shards/x") == 3
    assert run("inspect", "README") == 3
    assert capsys.readouterr().out == ""


# -- the terminal -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_any_encoding_of_standard_output(work: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    console.emit({"weight": "λ 😀 \ud800"}, "", as_json=True)
    console.emit({}, "λ █ é \ud800", as_json=False)
    first, _, text = raw.getvalue().decode(encoding).rpartition("}\n")
    assert json.loads(first + "}") == {"weight": "λ 😀 \ud800"}
    assert text == {
        "utf-8": "λ █ é \\ud800\n",
        "latin-1": "\\u03bb \\u2588 é \\ud800\n",
        "ascii": "\\u03bb \\u2588 \\xe9 \\ud800\n",
    }[encoding]  # fmt: skip


def test_a_reader_that_stops_reading(work: Path) -> None:
    names = {f"tensor.{number}": torch.zeros(1) for number in range(4000)}
    write_checkpoint(work / "many", names)
    reader = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    command = [sys.executable, "-m", "bigmerge", "inspect", "many", "--tensors"]
    writer = subprocess.run(command, stdout=reader.stdin, stderr=subprocess.PIPE, text=True, check=False)
    told, _ = reader.communicate()
    assert told == b"many: model\n"
    assert "Traceback" not in writer.stderr
    assert "Exception" not in writer.stderr


def test_control_c_before_the_merge_begins(
    work: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bigmerge.merging.api.plan_merge", interrupted)
    assert run("merge", *everything(work), "-o", "out") == 130
    assert "run the same command again to go on" in capsys.readouterr().err
