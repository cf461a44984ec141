"""bigmerge.checkpoints.fisher_facts: what a Fisher's header records, and headers that record nonsense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bigmerge.checkpoints.arguments import resolve
from bigmerge.checkpoints.fisher_facts import FACTS_KEY, SUMS_KEY, fisher_facts, is_fisher, recorded_moments
from bigmerge.errors import CheckpointError
from tests.building import write_fisher
from tests.conftest import normal, write_checkpoint

TENSORS = {"a": normal((3, 4), 0).square(), "b": normal(5, 1).square(), "empty": torch.empty(0)}


@pytest.mark.parametrize("shards", [1, 3])
def test_facts_and_sums(tmp_path: Path, shards: int) -> None:
    fisher = resolve(write_fisher(tmp_path / "f", TENSORS, facts={"labels": "exact"}, shards=shards))
    assert is_fisher(fisher)
    assert fisher_facts(fisher) == {"kind": "diagonal", "labels": "exact"}
    moments = recorded_moments(fisher)
    assert set(moments) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert moments[name].total == float(tensor.double().sum())
        assert moments[name].squares == float(tensor.double().square().sum())
        assert moments[name].elements == tensor.numel()
    assert moments["empty"].mean == 0.0


def test_a_fisher_that_says_nothing(tmp_path: Path) -> None:
    fisher = resolve(write_checkpoint(tmp_path / "f", TENSORS))
    assert not is_fisher(fisher)
    assert fisher_facts(fisher) == {}
    assert recorded_moments(fisher) == {}


def test_sums_of_other_tensors_are_ignored(tmp_path: Path) -> None:
    sums = json.dumps({"a": [1, 2.5], "gone": [1, 1]})
    fisher = resolve(write_checkpoint(tmp_path / "f", TENSORS, metadata={SUMS_KEY: sums}))
    assert set(recorded_moments(fisher)) == {"a"}


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        (FACTS_KEY, "{", "'bigmerge.fisher' is no JSON"),
        (FACTS_KEY, "[]", "'bigmerge.fisher' is no JSON object"),
        (FACTS_KEY, "[" * 100_000, "'bigmerge.fisher' is no JSON"),
        (SUMS_KEY, "null", "'bigmerge.sums' is no JSON object"),
        (SUMS_KEY, '{"a": 3}', "the sums recorded for 'a' are 3"),
        (SUMS_KEY, '{"a": [1]}', "the sums recorded for 'a'"),
        (SUMS_KEY, '{"a": [1, "2"]}', "the sums recorded for 'a'"),
        (SUMS_KEY, '{"a": [-1, 2]}', "the sums recorded for 'a'"),
        (SUMS_KEY, '{"a": [NaN, 2]}', "the sums recorded for 'a'"),
        (SUMS_KEY, '{"a": [1, Infinity]}', "the sums recorded for 'a'"),
        (SUMS_KEY, '{"a": [true, 1]}', "the sums recorded for 'a'"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, key: str, text: str, message: str) -> None:
    fisher = resolve(write_checkpoint(tmp_path / "f", TENSORS, metadata={key: text}))
    with pytest.raises(CheckpointError, match=message) as caught:
        fisher_facts(fisher) if key == FACTS_KEY else recorded_moments(fisher)
    assert str(tmp_path / "f") in caught.value.message
