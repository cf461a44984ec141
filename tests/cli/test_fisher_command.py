"""`bigmerge fisher` as a command: options, what it prints, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bigmerge.cli import main as entry

sys.path.insert(0, str(Path(__file__).parents[1] / "fisher"))
from tiny_checkpoints import rows, save_bert, save_csv


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_bert(root / "bert")
    save_csv(root / "data.csv", rows(9))
    return root


@pytest.fixture
def fisher(models, capfd):
    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            entry.main(["fisher", str(models / "bert"), "--cpu", *arguments])
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_run_for_people(models, fisher, tmp_path):
    code, out, err = fisher("--dataset", str(models / "data.csv"), "-o", str(tmp_path / "f"))
    assert code == 0
    for part in ("sequence-classification", "exact", "9 (9 positions scored)", "trace", str(tmp_path / "f")):
        assert part in out
    assert "fisher: 100%" in err
    assert "self-check" in err


def test_a_run_for_programs(models, fisher, tmp_path):
    options = [
        "--draws",
        "3",
        "--labels",
        "sampled",
        "--seed",
        "5",
        "--num-examples",
        "4",
        "--max-length",
        "6",
    ]
    options += ["--text-column", "text", "--label-column", "label", "--split", "train", "--no-shuffle"]
    options += ["--per-example", "loop", "--batch-size", "2", "--memory", "64MiB", "--dtype", "bfloat16"]
    options += ["--save-every", "9", "--shard-size", "4KB", "--task", "sequence-classification"]
    code, out, err = fisher(
        "--dataset", str(models / "data.csv"), "-o", str(tmp_path / "f"), "--json", "--quiet", *options
    )
    assert (code, err) == (0, "")
    facts = json.loads(out)["fisher"]
    expected = {
        "labels": "sampled",
        "draws": 3,
        "seed": 5,
        "examples": 4,
        "max_length": 6,
        "engine": "loop",
        "dtype": "bfloat16",
    }
    assert {key: facts[key] for key in expected} == expected
    assert len(list((tmp_path / "f").glob("*.safetensors"))) > 1


def test_a_dry_run(models, fisher, tmp_path):
    code, out, _ = fisher("--dataset", str(models / "data.csv"), "-o", str(tmp_path / "f"), "--dry-run")
    assert code == 0
    assert "nothing written yet" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--text-column", "body"], 3, "no column 'body'"),
        (["--labels", "exactly"], 2, "did you mean 'exact'"),
        (["--memory", "lots"], 2, "no amount of memory"),
        (["--max-length", "33"], 2, "more than the 32 tokens"),
        (["-o", "."], 4, "exists already|no name"),
    ],
)
def test_errors_have_exit_codes_and_one_message(models, fisher, tmp_path, options, code, message):
    import re

    base = ["--dataset", str(models / "data.csv"), "-o", str(tmp_path / "f"), "--json"]
    got, out, err = fisher(*base, *options)
    assert got == code
    assert re.search(message, err)
    assert err.count("bigmerge: error:") == 1
    told = json.loads(out)
    assert re.search(message, f"{told['message']} {told['hint']}")
    assert not list(tmp_path.iterdir())


def test_other_than_the_main_process_is_silent(models, fisher, tmp_path, monkeypatch):
    from bigmerge.errors import DatasetError

    def fail(*arguments, **options):
        raise DatasetError("no such thing")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("bigmerge.fisher.api.estimate_fisher", fail)
    assert fisher("--dataset", "x", "--json") == (3, "", "")


def test_interruption_has_its_exit_code(models, fisher, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bigmerge.fisher.api.estimate_fisher", stop)
    code, _, err = fisher("--dataset", "x")
    assert code == 130
    assert "interrupted" in err


def test_help_needs_nothing_heavy():
    program = (
        "import sys\n"
        "from bigmerge.cli.main import main\n"
        "try:\n    main(['fisher', '--help'])\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--multi-gpu" in done.stdout
