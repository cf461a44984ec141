"""bigmerge.merging.alignment (with comparison and heads): what becomes of every tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bigmerge.checkpoints.arguments import resolve
from bigmerge.errors import AlignmentError, CheckpointError, UsageError
from bigmerge.merging.alignment import Alignment, Selection, align
from bigmerge.merging.comparison import same_content, tied_names
from bigmerge.merging.heads import head_tensors, same_labels
from bigmerge.merging.sources import Source
from tests.building import write_fisher
from tests.conftest import Tensors, normal, write_checkpoint

SHAPES: dict[str, tuple[int, ...]] = {"enc.0.weight": (4, 3), "enc.0.bias": (4,), "enc.1.weight": (2, 4)}


def model(seed: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {name: normal(shape, seed + n) for n, (name, shape) in enumerate(SHAPES.items())}
    return tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


class Bench:
    """Writes models, Fishers and a base into one directory and aligns them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def align(
        self,
        *models: Tensors,
        configs: Sequence[Mapping[str, Any] | None] = (),
        fishers: Sequence[Tensors | None] = (),
        base: Tensors | None = None,
        base_config: Mapping[str, Any] | None = None,
        facts: Sequence[Mapping[str, Any]] = (),
        target: int = 0,
        **selection: Any,
    ) -> Alignment:
        sources = []
        for number, tensors in enumerate(models):
            name = "abcdef"[number]
            config = configs[number] if configs else None
            root = write_checkpoint(self.root / name, tensors, config=config)
            fisher = None
            if fishers and (values := fishers[number]) is not None:
                told = facts[number] if facts else None
                fisher = resolve(write_fisher(self.root / f"{name}-fisher", values, facts=told))
            sources.append(Source(name, resolve(root), fisher=fisher))
        base_root = (
            write_checkpoint(self.root / "base", base, config=base_config) if base is not None else None
        )
        return align(
            sources,
            target=target,
            companions=("fisher",) if fishers else (),
            base=resolve(base_root) if base_root is not None else None,
            selection=Selection(**selection),
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def merged(alignment: Alignment) -> list[str]:
    return [entry.name for entry in alignment.merged]


def kept(alignment: Alignment) -> dict[str, str]:
    return {entry.name: entry.reason for entry in alignment.kept}


# -- the same everywhere ------------------------------------------------------------------------------------


def test_all_alike(bench: Bench) -> None:
    found = bench.align(model(0), model(1), model(2), target=1, base=model(3))
    assert merged(found) == ["enc.0.bias", "enc.0.weight", "enc.1.weight"]
    assert kept(found) == found.dropped == {}
    assert found.warnings == ()
    for entry in found.merged:
        assert [spec.path.parent.name for spec in entry.models] == ["a", "b", "c"]
        assert {spec.name for spec in entry.models} == {entry.name}
        assert entry.base is not None
        assert entry.base.path.parent.name == "base"
        assert entry.companions == {}


def test_dtypes_may_differ(bench: Bench) -> None:
    half = {name: tensor.to(torch.bfloat16) for name, tensor in model(1).items()}
    assert len(merged(bench.align(model(0), half))) == 3


# -- missing and reshaped -----------------------------------------------------------------------------------


def test_missing_and_reshaped_are_kept_from_the_target(bench: Bench) -> None:
    extra = normal((3, 3), 9)
    first = model(0, only_a=extra, in_two=extra.clone(), shape=normal((2, 3), 1))
    second = model(1, in_two=extra, shape=normal((3, 2), 1), only_b=extra.clone())
    third = model(2, shape=normal((2, 3), 2), only_b=extra, only_c=extra.clone())
    found = bench.align(first, second, third)
    assert merged(found) == ["enc.0.bias", "enc.0.weight", "enc.1.weight"]
    assert kept(found) == {
        "only_a": "missing in b, c",
        "in_two": "missing in c",
        "shape": "shape [2, 3] differs in b [3, 2]",
    }
    assert found.dropped == {
        "only_b": "not in the target, only in b, c",
        "only_c": "not in the target, only in c",
    }
    assert all(entry.spec.path.parent.name == "a" for entry in found.kept)


def test_the_target_decides(bench: Bench) -> None:
    found = bench.align(model(0, x=normal(3, 0)), model(1, x=normal(4, 0), y=normal(2, 0)), target=1)
    assert kept(found) == {"x": "shape [4] differs in a [3]", "y": "missing in a"}
    assert all(entry.spec.path.parent.name == "b" for entry in found.kept)


def test_strict_reports_every_one_at_once(bench: Bench) -> None:
    first = model(0, a1=normal(2, 0), a2=normal(3, 0), ids=torch.arange(3))
    second = model(1, a2=normal(4, 0), b1=normal(2, 0), ids=torch.arange(3))
    with pytest.raises(AlignmentError, match="3 tensors do not fit together") as caught:
        bench.align(first, second, strict=True)
    assert caught.value.data["problems"] == [
        "a1: missing in b",
        "a2: shape [3] differs in b [4]",
        "b1: not in the target, only in b",
    ]
    assert all(line in caught.value.message for line in caught.value.data["problems"])
    left = bench.align(
        first, second | {"a1": first["a1"]}, exclude=("a2",), include=("a*", "e*"), strict=False
    )
    assert kept(left)["a2"] == "excluded by 'a2'"
    found = bench.align(model(0, x=normal(2, 0)), model(1), exclude=("x",), strict=True)
    assert kept(found) == {"x": "excluded by 'x'"}, "what a pattern leaves out is no problem"


def test_of_many_problems_some_are_shown_and_all_are_data(bench: Bench) -> None:
    many = {f"w.{n}": normal(2, n) for n in range(40)}
    with pytest.raises(AlignmentError, match="40 tensors do not fit") as caught:
        bench.align(model(0, **many), model(1), strict=True)
    assert len(caught.value.data["problems"]) == 40
    assert "and 28 more (--json lists all)" in caught.value.message
    assert len(caught.value.as_json()["data"]["problems"]) == 40


def test_nothing_in_common(bench: Bench) -> None:
    with pytest.raises(
        AlignmentError, match="nothing is left to merge: of 3 tensors, missing in b"
    ) as caught:
        bench.align(model(0), {"x": normal(2, 0)})
    assert "fine-tuned from the same model" in str(caught.value)


def test_nothing_at_all(bench: Bench) -> None:
    with pytest.raises(AlignmentError, match="the target holds no tensors"):
        bench.align({}, {})


# -- patterns -----------------------------------------------------------------------------------------------


def test_include_and_exclude(bench: Bench) -> None:
    found = bench.align(model(0), model(1), include=("enc.*.weight", "*.bias"), exclude=("enc.1.*",))
    assert merged(found) == ["enc.0.bias", "enc.0.weight"]
    assert kept(found) == {"enc.1.weight": "excluded by 'enc.1.*'"}
    found = bench.align(model(0), model(1), include=("enc.[1-9].*",))
    assert merged(found) == ["enc.1.weight"]
    assert set(kept(found).values()) == {"matches no --include pattern"}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_without_effect_is_a_mistake(bench: Bench, option: str) -> None:
    with pytest.raises(UsageError, match=f"--{option} 'Enc' matches no tensor"):
        bench.align(model(0), model(1), **{option: ("enc.*", "Enc")})


# -- integers and others ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_must_agree(bench: Bench, dtype: torch.dtype) -> None:
    one, two = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([0, 1, 0]).to(dtype)
    found = bench.align(model(0, ids=one), model(1, ids=one.clone()))
    assert kept(found)["ids"].startswith("integers (")
    assert bench.align(model(0, ids=one), model(1, ids=one), strict=True)
    with pytest.raises(AlignmentError, match="ids: integer tensor differs between the target and c"):
        bench.align(model(0, ids=one), model(1, ids=one), model(2, ids=two))
    found = bench.align(model(0, ids=one), model(1, ids=two), exclude=("ids",))
    assert kept(found)["ids"] == "excluded by 'ids'"


def test_integers_of_different_width_differ(bench: Bench) -> None:
    with pytest.raises(AlignmentError, match="ids: integer tensor differs"):
        bench.align(model(0, ids=torch.arange(3)), model(1, ids=torch.arange(3, dtype=torch.int32)))


def test_integers_against_numbers_are_kept(bench: Bench) -> None:
    found = bench.align(model(0, x=torch.arange(3)), model(1, x=torch.arange(3.0)))
    assert kept(found) == {"x": "dtype F32, I64 cannot be averaged"}


def test_same_content_reads_in_pieces(tmp_path: Path) -> None:
    numbers = torch.arange(3_000_000, dtype=torch.int32)
    changed = numbers.clone()
    changed[-1] += 1
    files = {"one": numbers, "two": numbers, "other": changed}
    for name, tensor in files.items():
        save_file({"ids": tensor, "pad": torch.ones(len(name))}, tmp_path / f"{name}.safetensors")
    one, two, other = (resolve(tmp_path / f"{name}.safetensors").tensors["ids"] for name in files)
    assert same_content(one, two)
    assert not same_content(one, other)
    assert same_content(other, other)
    two.path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        same_content(one, two)


def test_complex_numbers_are_kept(bench: Bench) -> None:
    for name in "ab":
        root = bench.root / name
        write_checkpoint(root, model(0))
        header = {"z": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}
        header["y"] = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}
        raw = json.dumps(header).encode()
        content = len(raw).to_bytes(8, "little") + raw + bytes(12)
        (root / "model.safetensors").write_bytes(content)
    sources = [Source(name, resolve(bench.root / name)) for name in "ab"]
    found = align(sources, target=0, companions=(), base=None, selection=Selection())
    assert kept(found) == {"z": "dtype C64 cannot be averaged"}


# -- the base -----------------------------------------------------------------------------------------------


def test_what_the_base_lacks_is_kept(bench: Bench) -> None:
    base = model(5)
    del base["enc.0.bias"]
    base["enc.0.weight"] = normal((3, 4), 0)
    base["enc.1.weight"] = torch.ones(2, 4, dtype=torch.int8)
    first, second = model(0, x=normal(2, 0)), model(1, x=normal(2, 1))
    found = bench.align(first, second, base=base | {"x": normal(2, 2)})
    assert merged(found) == ["x"]
    assert kept(found) == {
        "enc.0.bias": "missing in the base",
        "enc.0.weight": "shape [4, 3] differs in the base [3, 4]",
        "enc.1.weight": "dtype I8 of the base cannot be averaged",
    }
    with pytest.raises(AlignmentError, match="4 tensors do not fit"):
        bench.align(first, second, base=base, strict=True)


# -- Fishers ------------------------------------------------------------------------------------------------


def squares(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.square() for name, tensor in tensors.items()}


def test_fishers_are_matched(bench: Bench) -> None:
    found = bench.align(model(0), model(1), fishers=[squares(model(2)), squares(model(3))], base=model(4))
    assert len(found.merged) == 3
    for entry in found.merged:
        assert [spec.path.parent.name for spec in entry.companions["fisher"]] == ["a-fisher", "b-fisher"]


def test_fishers_that_lack_tensors(bench: Bench) -> None:
    nowhere = squares(model(2))
    del nowhere["enc.0.bias"]
    found = bench.align(model(0), model(1), fishers=[nowhere, nowhere])
    assert kept(found) == {"enc.0.bias": "no Fisher in any model"}
    with pytest.raises(AlignmentError, match=r"enc\.0\.bias: no Fisher in any model"):
        bench.align(model(0), model(1), fishers=[nowhere, nowhere], strict=True)
    with pytest.raises(AlignmentError) as caught:
        bench.align(model(0), model(1), fishers=[nowhere, squares(model(3))])
    assert caught.value.data["problems"] == ["enc.0.bias: missing in a's Fisher, but not in every Fisher"]
    found = bench.align(model(0), model(1), fishers=[nowhere, squares(model(3))], exclude=("*.bias",))
    assert kept(found) == {"enc.0.bias": "excluded by '*.bias'"}


def test_fishers_that_do_not_fit_are_all_reported(bench: Bench) -> None:
    wrong = squares(model(2))
    wrong["enc.0.bias"] = normal(5, 0).square()
    wrong["enc.1.weight"] = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(AlignmentError) as caught:
        bench.align(model(0), model(1), fishers=[squares(model(3)), wrong])
    assert caught.value.data["problems"] == [
        "enc.0.bias: b's Fisher has shape [5], the tensor [4]",
        "enc.1.weight: b's Fisher has dtype I64",
    ]


def test_models_without_fisher_are_named(bench: Bench) -> None:
    with pytest.raises(AlignmentError, match="there is none for: b, c") as caught:
        bench.align(model(0), model(1), model(2), fishers=[squares(model(3)), None, None])
    assert caught.value.data["models"] == ["b", "c"]


def test_fishers_measured_differently_are_mentioned(bench: Bench) -> None:
    fishers = [squares(model(2)), squares(model(3))]
    facts = [{"labels": "exact", "unit": "token"}, {"labels": "sampled", "unit": "token"}]
    found = bench.align(model(0), model(1), fishers=fishers, facts=facts)
    assert found.warnings == (
        "the Fishers differ in labels (exact, sampled); their scales are comparable only after normalisation",
    )


def test_a_fisher_of_other_weights_is_mentioned_and_strictly_refused(bench: Bench) -> None:
    fishers = [squares(model(2)), squares(model(3))]
    facts = [{}, {"model_fingerprint": "xxh3:0"}]
    found = bench.align(model(0), model(1), fishers=fishers, facts=facts)
    assert found.warnings == ("b's Fisher was measured on other weights than the model has",)
    with pytest.raises(AlignmentError, match="b's Fisher was measured on other weights"):
        bench.align(model(0), model(1), fishers=fishers, facts=facts, strict=True)


# -- prefixes -----------------------------------------------------------------------------------------------


def prefixed(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def test_a_bare_encoder_and_one_under_a_head(bench: Bench) -> None:
    bare, headed = model(0), prefixed(model(1), "bert") | {"classifier.weight": normal((2, 4), 0)}
    found = bench.align(headed, bare, base=bare)
    assert merged(found) == [f"bert.{name}" for name in sorted(SHAPES)]
    assert kept(found) == {"classifier.weight": "missing in b"}
    assert found.warnings == (
        "b: read with 'bert' before each name, to match the target's names",
        "the base: read with 'bert' before each name, to match the target's names",
    )
    for entry in found.merged:
        assert entry.models[1].name == entry.name.removeprefix("bert.")
    found = bench.align(headed, bare, target=1, fishers=[squares(headed), squares(bare)])
    assert merged(found) == sorted(SHAPES)
    assert found.dropped == {"classifier.weight": "not in the target, only in a"}
    assert [entry.companions["fisher"][0].name for entry in found.merged] == [
        f"bert.{n}" for n in sorted(SHAPES)
    ]
    assert len(found.warnings) == 2


def test_names_that_match_are_left_alone(bench: Bench) -> None:
    # Each has both levels; moving either would match some names too.
    nested = model(0) | prefixed(model(1), "enc")
    assert bench.align(nested, nested).warnings == ()
    assert len(bench.align(nested, model(2)).merged) == 3


def test_two_names_never_become_one(bench: Bench) -> None:
    both = prefixed(model(0), "x") | {"enc.0.bias": normal(4, 9)}
    found = bench.align(model(1), both)
    assert merged(found) == ["enc.0.bias"]


# -- ties ---------------------------------------------------------------------------------------------------


def language_model(seed: int, *, tied: bool = True) -> dict[str, torch.Tensor]:
    embedding = normal((7, 4), seed)
    return {
        "model.embed_tokens.weight": embedding,
        "model.layers.0.weight": normal((4, 4), seed + 1),
        "lm_head.weight": embedding.clone() if tied else normal((7, 4), seed + 2),
    }


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}]
)
def test_a_doubled_tied_embedding_is_merged_once(bench: Bench, config: dict[str, Any]) -> None:
    found = bench.align(language_model(0), language_model(5), configs=[config, config])
    assert merged(found) == ["model.embed_tokens.weight", "model.layers.0.weight"]
    assert found.dropped == {"lm_head.weight": "tied to model.embed_tokens.weight"}


@pytest.mark.parametrize("config", [None, {}, {"tie_word_embeddings": False}])
def test_equal_content_alone_is_no_tie(bench: Bench, config: dict[str, Any] | None) -> None:
    found = bench.align(language_model(0), language_model(5), configs=[config, config])
    assert "lm_head.weight" in merged(found)


def test_a_tie_that_the_config_claims_and_the_content_denies(bench: Bench) -> None:
    config = {"tie_word_embeddings": True}
    untied = language_model(0, tied=False)
    found = bench.align(untied, language_model(5, tied=False), configs=[config, config])
    assert "lm_head.weight" in merged(found)
    assert found.dropped == {}


def test_shared_storage_in_pytorch_files_is_a_tie(tmp_path: Path) -> None:
    sources = []
    for number, name in enumerate("ab"):
        shared = normal((7, 4), number)
        state = {"lm_head.weight": shared, "wte.weight": shared, "h.weight": normal((4, 4), number + 5)}
        state["first.rows"] = shared[:2]
        torch.save(state, tmp_path / f"{name}.bin")
        sources.append(Source(name, resolve(tmp_path / f"{name}.bin")))
    assert tied_names(sources[0].checkpoint) == {"lm_head.weight": "wte.weight"}
    found = align(sources, target=0, companions=(), base=None, selection=Selection())
    assert merged(found) == ["first.rows", "h.weight", "wte.weight"]
    assert found.dropped == {"lm_head.weight": "tied to wte.weight"}


def test_the_shared_embedding_stands_for_the_others(tmp_path: Path) -> None:
    shared = normal((7, 4), 0)
    names = ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight", "shared.weight"]
    torch.save(dict.fromkeys(names, shared), tmp_path / "t5.bin")
    assert tied_names(resolve(tmp_path / "t5.bin")) == dict.fromkeys(names[:3], "shared.weight")
    root = write_checkpoint(
        tmp_path / "t5", {name: shared.clone() for name in names}, config={"tie_word_embeddings": True}
    )
    assert tied_names(resolve(root)) == dict.fromkeys(names[:3], "shared.weight")


def test_empty_tensors_are_not_tied_to_each_other(bench: Bench) -> None:
    tensors = model(0, e1=torch.empty(0, 2), e2=torch.empty(0, 2))
    assert bench.align(tensors, tensors).dropped == {}


# -- heads --------------------------------------------------------------------------------------------------

CLASSIFIER = {"architectures": ["BertForSequenceClassification"]}


def classifier(seed: int, labels: int = 2) -> dict[str, torch.Tensor]:
    head = {"classifier.weight": normal((labels, 4), seed + 7), "classifier.bias": normal(labels, seed + 8)}
    return prefixed(model(seed), "bert") | head


def with_labels(*names: str) -> dict[str, Any]:
    return {**CLASSIFIER, "id2label": {str(number): name for number, name in enumerate(names)}}


HEAD = {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (CLASSIFIER, CLASSIFIER),
        (with_labels("LABEL_0", "LABEL_1"), with_labels("LABEL_0", "LABEL_1")),
        (with_labels("no", "yes"), with_labels("yes", "no")),
        (with_labels("no", "yes"), CLASSIFIER),
        (None, None),
        (CLASSIFIER, None),
    ],
)
def test_heads_of_equal_shape_are_the_targets(bench: Bench, one: Any, other: Any) -> None:
    found = bench.align(classifier(0), classifier(1), configs=[one, other])
    assert set(kept(found)) == HEAD
    assert set(kept(found).values()) == {"task head (--merge-heads merges it)"}
    assert (
        set(merged(bench.align(classifier(0), classifier(1), configs=[one, other], merge_heads=True))) >= HEAD
    )
    with pytest.raises(AlignmentError, match=r"classifier\.bias: task head"):
        bench.align(classifier(0), classifier(1), configs=[one, other], strict=True)
    found = bench.align(
        classifier(0), classifier(1), configs=[one, other], strict=True, exclude=("classifier.*",)
    )
    assert set(kept(found)) == HEAD


def test_heads_of_the_same_task_are_merged(bench: Bench) -> None:
    labels = with_labels("negative", "positive")
    assert set(merged(bench.align(classifier(0), classifier(1), configs=[labels, labels]))) >= HEAD


def test_heads_of_other_shape(bench: Bench) -> None:
    found = bench.align(classifier(0), classifier(1, labels=3), configs=[CLASSIFIER] * 2, merge_heads=True)
    assert kept(found)["classifier.weight"] == "shape [2, 4] differs in b [3, 4]"


@pytest.mark.parametrize(
    ("config", "names", "heads"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, ["model.a", "model.b", "score.weight"],
         ["score.weight"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["model.a", "model.b", "lm_head.weight"], []),
        ({"architectures": ["T5ForConditionalGeneration"]}, ["shared.weight", "encoder.a", "encoder.b"], []),
        ({"architectures": ["DistilBertForQuestionAnswering"]}, ["distilbert.a", "distilbert.b", "qa_outputs.weight"],
         ["qa_outputs.weight"]),
        ({"architectures": "BertForSequenceClassification"}, ["bert.a", "bert.b", "classifier.weight"], []),
        ({"architectures": [5, None]}, ["bert.a", "bert.b", "classifier.weight"], []),
        ({}, ["bert.a", "bert.b", "classifier.weight"], []),
        (None, ["bert.a", "bert.b", "classifier.weight"], ["classifier.weight"]),
        (None, ["model.a", "lm_head.weight"], []),
    ],
)  # fmt: skip
def test_head_tensors(tmp_path: Path, config: Any, names: list[str], heads: list[str]) -> None:
    root = write_checkpoint(tmp_path / "m", {name: normal(2, 0) for name in names}, config=config)
    assert sorted(head_tensors(resolve(root))) == heads


def test_same_labels(tmp_path: Path) -> None:
    configs: list[Any] = [
        with_labels("no", "yes"),
        with_labels("no", "yes"),
        with_labels("a"),
        {"id2label": [1]},
        None,
    ]
    checkpoints = [
        resolve(write_checkpoint(tmp_path / str(number), model(0), config=config))
        for number, config in enumerate(configs)
    ]
    assert same_labels(checkpoints[:2])
    for other in checkpoints[2:]:
        assert not same_labels([checkpoints[0], other])
        assert not same_labels([other, other]) or other is checkpoints[2]


# -- quantised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind"), [({"quant_method": "gptq"}, "gptq"), ({"bits": 4}, "unknown"), ("fp8", "fp8")]
)
def test_quantised_models_are_refused(bench: Bench, settings: Any, kind: str) -> None:
    config = {"quantization_config": settings}
    for configs, base_config in (([{}, config], None), ([{}, {}], config)):
        with pytest.raises(CheckpointError, match=rf"is quantised \({kind}\)") as caught:
            bench.align(model(0), model(1), configs=configs, base=model(2), base_config=base_config)
        assert str(bench.root) in caught.value.message
