"""Whole estimates in this process, against enumeration with autograd; what is recorded; going on; bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import VOCABULARY, rows, save_bert, save_csv, save_llama, save_tokenizer

import bigmerge
from bigmerge.checkpoints.checkpoint import open_checkpoint
from bigmerge.errors import (
    CheckpointError,
    DatasetError,
    EstimationError,
    InputError,
    Interrupted,
    OutputError,
    ResumeError,
    UsageError,
)

ROWS = rows(23)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_bert(root / "bert")
    save_llama(root / "llama")
    save_bert(root / "bare", head=False)
    save_csv(root / "data.csv", ROWS)
    return root


def estimate(models, model, out, **options):
    options.setdefault("dataset", models / "data.csv")
    return bigmerge.estimate_fisher(models / model, out, progress=False, cpu=True, **options)


def read(out: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def reference_classifier(directory: Path, texts: list[str], weights) -> dict[str, torch.Tensor]:
    """Mean over texts of Σ_k weights(p, k) (∇ log p_k)², one text and one class at a time, in float64."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for i, text in enumerate(texts):
        for k in range(model.config.num_labels):
            model.zero_grad()
            logp = model(**tokenizer(text, return_tensors="pt")).logits[0].log_softmax(-1)
            weight = weights(logp.detach().exp(), k, i)
            logp[k].backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] += weight * parameter.grad**2
    return {name: value / len(texts) for name, value in total.items()}


def assert_same(found, expected, tolerance=2e-5):
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = max(float(value.norm()), 1e-12)
        assert float((found[name].double() - value).norm()) / scale < tolerance, name


# -- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_classifier_equals_enumeration(models, tmp_path, engine):
    result = estimate(models, "bert", tmp_path / "f", per_example=engine, memory="40KiB")
    assert (result["labels"], result["engine"], result["examples"]) == ("exact", engine, 23)
    expected = reference_classifier(models / "bert", [row["text"] for row in ROWS], lambda p, k, i: p[k])
    # softmax does not see a key's bias: its gradient is zero, and what is left of it rounding
    expected = {name: value for name, value in expected.items() if not name.endswith("key.bias")}
    found = read(tmp_path / "f")
    assert_same({name: found[name] for name in expected}, expected)


def test_empirical_classifier_uses_the_datas_labels(models, tmp_path):
    estimate(models, "bert", tmp_path / "f", labels="empirical")
    expected = reference_classifier(
        models / "bert", [row["text"] for row in ROWS], lambda p, k, i: float(ROWS[i]["label"] == k)
    )
    expected = {name: value for name, value in expected.items() if not name.endswith("key.bias")}
    found = read(tmp_path / "f")
    assert_same({name: found[name] for name in expected}, expected)


def test_language_model_counts_a_sequence_as_one_example(models, tmp_path):
    import transformers

    result = estimate(models, "llama", tmp_path / "f", labels="empirical")
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "llama").double().eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    tokens = 0
    for row in ROWS:
        ids = torch.tensor([[VOCABULARY.index(word) for word in row["text"].split()]])
        model.zero_grad()
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        logp.gather(1, ids[0, 1:, None]).sum().backward()
        tokens += ids.shape[1] - 1
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad**2
    assert result["tokens"] == tokens
    assert_same(read(tmp_path / "f"), {name: value / len(ROWS) for name, value in total.items()})


def test_drawn_labels_depend_on_the_seed_alone(models, tmp_path):
    base = {"labels": "sampled", "draws": 2}
    for model in ("bert", "llama"):
        estimate(models, model, tmp_path / f"{model}-a", **base)
        estimate(models, model, tmp_path / f"{model}-b", batch_size=1, per_example="loop", **base)
        estimate(models, model, tmp_path / f"{model}-c", seed=1, **base)
        first, second, other = (read(tmp_path / f"{model}-{x}") for x in "abc")
        names = [name for name in first if not name.endswith("key.bias")]
        assert_same({n: first[n] for n in names}, {n: second[n].double() for n in names}, tolerance=1e-4)
        assert any(not torch.allclose(first[n], other[n], rtol=0.01) for n in names)


# -- what is recorded ------------------------------------------------------------------------------------


def test_metadata_sums_are_those_of_the_stored_values(models, tmp_path):
    out = tmp_path / "f"
    result = estimate(models, "bert", out, dtype="bfloat16", shard_size="4KB", num_examples=9, max_length=8)
    fisher = open_checkpoint(out)
    model = open_checkpoint(models / "bert")
    assert len(fisher.files) > 2
    assert {n: s.shape for n, s in fisher.tensors.items()} == {n: s.shape for n, s in model.tensors.items()}
    assert {spec.dtype for spec in fisher.tensors.values()} == {"BF16"}
    stored = read(out)
    moments: dict[str, list[float]] = {}
    for path in fisher.files:
        metadata = fisher.file_metadata[path]
        part = json.loads(metadata["bigmerge.sums"])
        assert set(part) == {name for name, spec in fisher.tensors.items() if spec.path == path}
        assert metadata["format"] == "pt"
        assert json.loads(metadata["bigmerge.fisher"]) == result["fisher"]
        moments |= part
    for name, (total, squares) in moments.items():
        value = stored[name].double()
        assert math.isclose(total, float(value.sum()), rel_tol=1e-12)
        assert math.isclose(squares, float((value * value).sum()), rel_tol=1e-12)
    facts = result["fisher"]
    assert math.isclose(facts["sum"], math.fsum(total for total, _ in moments.values()), rel_tol=1e-12)
    assert math.isclose(facts["sum_squares"], math.fsum(s for _, s in moments.values()), rel_tol=1e-12)
    assert facts["elements"] == sum(value.numel() for value in stored.values())
    assert facts["zeros"] == sum(int((value == 0).sum()) for value in stored.values())
    assert facts["model_fingerprint"] == model.fingerprint()
    assert json.loads((out / "fisher_info.json").read_text()) == facts
    expected = {
        "format": 1,
        "kind": "diagonal",
        "model_name": "bert",
        "task": "sequence-classification",
        "labels": "exact",
        "unit": "sequence",
        "examples": 9,
        "tokens": 9,
        "max_length": 8,
        "seed": 0,
        "model_dtype": "float32",
        "dtype": "bfloat16",
        "bigmerge_version": bigmerge.__version__,
    }
    assert {key: facts[key] for key in expected} == expected
    assert facts["dataset"].keys() == {"name", "split", "columns", "fingerprint"}


def test_bfloat16_is_the_rounded_float32(models, tmp_path):
    estimate(models, "llama", tmp_path / "wide")
    estimate(models, "llama", tmp_path / "narrow", dtype="bfloat16")
    wide, narrow = read(tmp_path / "wide"), read(tmp_path / "narrow")
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in wide)


def test_half_precision_models(models, tmp_path):
    """bfloat16 stays; float16, in which squares underflow, is computed with in float32."""
    import transformers

    for dtype, used in ((torch.bfloat16, "bfloat16"), (torch.float16, "float32")):
        directory = tmp_path / str(dtype)
        shutil.copytree(models / "bert", directory)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(models / "bert")
        model.to(dtype).save_pretrained(directory)
        result = estimate(models, directory, tmp_path / f"f-{used}", num_examples=8)
        assert result["fisher"]["model_dtype"] == used
        assert {value.dtype for value in read(tmp_path / f"f-{used}").values()} == {torch.float32}


def test_default_output_is_beside_the_model(models, tmp_path):
    shutil.copytree(models / "bert", tmp_path / "m")
    result = estimate(models, tmp_path / "m", None, num_examples=2)
    assert Path(result["output"]) == tmp_path / "m-fisher"
    assert read(tmp_path / "m-fisher")


def test_a_dry_run_writes_nothing_and_says_the_same(models, tmp_path):
    planned = estimate(models, "bert", tmp_path / "f", dry_run=True, max_length=6)
    assert list(tmp_path.iterdir()) == []
    done = estimate(models, "bert", tmp_path / "f", max_length=6)
    for key in ("task", "labels", "engine", "examples", "tokens", "columns", "max_length", "parameters"):
        assert planned[key] == done[key], key
    assert planned["output_bytes"] == 4 * done["parameters"]


# -- rows ------------------------------------------------------------------------------------------------


def test_rows_without_anything_to_score_are_left_out(models, tmp_path):
    content = [{"text": "the cat sat"}, {"text": ""}, {"text": "cat"}, {"text": "a dog ran"}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    result = estimate(models, "llama", tmp_path / "f", dataset=path)
    assert (result["examples"], result["skipped"], result["tokens"]) == (2, 2, 4)
    path.write_text(json.dumps({"text": "cat"}) + "\n")
    with pytest.raises(DatasetError, match="anything to score"):
        estimate(models, "llama", tmp_path / "g", dataset=path)


def test_labels_out_of_range_matter_only_where_labels_are_read(models, tmp_path):
    path = save_csv(tmp_path / "d.csv", [*ROWS[:3], {"text": "the cat", "label": 7}])
    assert estimate(models, "bert", tmp_path / "f", dataset=path)["examples"] == 4
    with pytest.raises(DatasetError, match="row 3: the label 7 is outside") as caught:
        estimate(models, "bert", tmp_path / "g", dataset=path, labels="empirical")
    assert caught.value.data["num_labels"] == 3
    unlabelled = save_csv(tmp_path / "u.csv", [{"text": row["text"]} for row in ROWS[:3]])
    assert estimate(models, "bert", tmp_path / "h", dataset=unlabelled)["examples"] == 3
    with pytest.raises(DatasetError, match="no label column"):
        estimate(models, "bert", tmp_path / "g", dataset=unlabelled, labels="empirical")
    assert not list(tmp_path.glob("g*"))


# -- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"text_columns": ["body"]}, DatasetError, "no column 'body'"),
        ({"max_length": 33}, UsageError, "more than the 32 tokens"),
        ({"max_length": 2}, UsageError, "leaves no room"),
        ({"labels": "guessed"}, UsageError, "no label source called 'guessed'"),
        ({"per_example": "magic"}, UsageError, "no per-example engine called 'magic'"),
        ({"task": "sequence-labelling"}, UsageError, "no task called"),
        ({"dtype": "float16"}, UsageError, "cannot be stored as 'float16'"),
        ({"num_examples": 0}, UsageError, "number of examples must be at least 1"),
        ({"split": "trian["}, DatasetError, "cannot be read"),
        ({"dataset": "no/such/file.csv"}, DatasetError, "no such file"),
    ],
)
def test_bad_options_are_one_error_before_anything_is_written(models, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        estimate(models, "bert", tmp_path / "f", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_the_head_is_refused(models, tmp_path):
    with pytest.raises(UsageError, match=r"BertModel.*belongs to no known task"):
        estimate(models, "bare", tmp_path / "f")
    with pytest.raises(CheckpointError, match=r"no weights for classifier\.bias") as caught:
        estimate(models, "bare", tmp_path / "f", task="sequence-classification")
    assert "classifier.weight" in caught.value.data["missing"]
    assert "without the task's head" in str(caught.value.hint)
    with pytest.raises(InputError, match="has no weights for cls"):
        estimate(models, "bert", tmp_path / "f", task="causal-lm")


def test_things_that_are_no_model(models, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        estimate(models, tmp_path / "nothing", tmp_path / "f")
    with pytest.raises(CheckpointError, match="is a file"):
        estimate(models, models / "bert" / "model.safetensors", tmp_path / "f")
    shutil.copytree(models / "bert", tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="tokenizer has no vocabulary"):
        estimate(models, tmp_path / "m", tmp_path / "f")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(InputError, match="its config cannot be loaded"):
        estimate(models, tmp_path / "m", tmp_path / "f")


def test_models_that_cannot_be_measured(models, tmp_path):
    save_bert(tmp_path / "regression", num_labels=1)
    with pytest.raises(InputError, match="regression"):
        estimate(models, tmp_path / "regression", tmp_path / "f")
    shutil.copytree(models / "bert", tmp_path / "quantized")
    config = json.loads((models / "bert" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized"):
        estimate(models, tmp_path / "quantized", tmp_path / "f")


def test_shapes_that_the_config_does_not_describe(models, tmp_path):
    shutil.copytree(models / "bert", tmp_path / "m")
    config = json.loads((models / "bert" / "config.json").read_text())
    config["intermediate_size"] = 20
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="shapes are not those that its config describes"):
        estimate(models, tmp_path / "m", tmp_path / "f")


def test_a_tokenizer_of_another_model(models, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m", kind="bert")
    with pytest.raises(InputError, match="the model has 8 tokens"):
        estimate(models, tmp_path / "m", tmp_path / "f")


def test_positions_behind_the_padding_index_are_counted(tmp_path):
    import transformers

    from bigmerge.fisher.loading import longest_input

    config = transformers.RobertaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=14,
        pad_token_id=1,
    )
    save_tokenizer(tmp_path, kind="bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.RobertaForSequenceClassification(config).eval()
    limit = longest_input(model, tokenizer)
    assert limit == 12
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_an_exact_expectation_over_a_vocabulary_is_refused(models, tmp_path):
    result = estimate(models, "llama", tmp_path / "few", labels="exact", num_examples=2)  # 24 × 11 passes
    assert result["labels"] == "exact"
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "cat " * 32}) + "\n")
    import bigmerge.fisher.prepare as prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_MOST_COLUMNS", 24 * 31 - 1)
        with pytest.raises(UsageError, match="744 backward passes"):
            estimate(models, "llama", tmp_path / "f", labels="exact", dataset=long)


def test_weights_that_are_not_finite(models, tmp_path):
    import transformers

    shutil.copytree(models / "bert", tmp_path / "m")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models / "bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[VOCABULARY.index("bird")] = float("nan")
    model.save_pretrained(tmp_path / "m")
    content = [{"text": "the cat"}, {"text": "a dog"}, {"text": "the old bird ran over the mat"}]
    data = save_csv(tmp_path / "d.csv", content)
    with pytest.raises(EstimationError, match="2"):
        estimate(models, tmp_path / "m", tmp_path / "f", dataset=data)
    assert not (tmp_path / "f").exists()


# -- output and going on ---------------------------------------------------------------------------------


def test_an_existing_output_is_left_alone_unless_told(models, tmp_path):
    estimate(models, "bert", tmp_path / "f", num_examples=2)
    before = read(tmp_path / "f")
    with pytest.raises(OutputError, match="exists already"):
        estimate(models, "bert", tmp_path / "f", num_examples=3)
    assert all(torch.equal(value, before[name]) for name, value in read(tmp_path / "f").items())
    estimate(models, "bert", tmp_path / "f", num_examples=3, overwrite=True)
    assert any(not torch.equal(value, before[name]) for name, value in read(tmp_path / "f").items())
    assert not (tmp_path / "f.partial").exists()


def test_the_model_itself_is_never_replaced(models, tmp_path):
    shutil.copytree(models / "bert", tmp_path / "a" / "bert")
    for out in (tmp_path / "a" / "bert", tmp_path / "a", tmp_path / "a" / "bert" / ".." / "bert"):
        with pytest.raises(UsageError, match="where the model itself lies"):
            estimate(models, tmp_path / "a" / "bert", out, overwrite=True)


def interrupt_after(monkeypatch, engine, batches: int, number=signal.SIGTERM) -> None:
    """Send this process a signal in the middle of the given batch, once."""
    original = engine.add
    seen = []

    def add(self, batch):
        if len(batch.ids) and self.sums and batch.ids not in seen:
            seen.append(batch.ids)
        if len(seen) == batches:
            seen.append(None)
            os.kill(os.getpid(), number)
        return original(self, batch)

    monkeypatch.setattr(engine, "add", add)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_estimate_goes_on_to_the_same_bytes(models, tmp_path, monkeypatch, number):
    from bigmerge.fisher.engines.hooks import HooksEngine

    options = {"batch_size": 2, "labels": "sampled", "per_example": "hooks"}
    estimate(models, "bert", tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_after(patch, HooksEngine, 5, number)
        with pytest.raises(Interrupted) as caught:
            estimate(models, "bert", tmp_path / "f", **options)
    assert "goes on" in str(caught.value.hint)
    assert not (tmp_path / "f").exists()
    with pytest.raises(ResumeError, match="seed: 0 before, 1 now"):
        estimate(models, "bert", tmp_path / "f", seed=1, **options)
    result = estimate(models, "bert", tmp_path / "f", **options)
    assert 2 <= result["resumed_examples"] < 23
    assert (tmp_path / "f" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "f.partial").exists()


def test_an_estimate_goes_on_with_other_batches(models, tmp_path, monkeypatch):
    """The sums of an earlier division of the work are taken over, and what remains is divided anew."""
    from bigmerge.fisher.engines.hooks import HooksEngine

    options = {"labels": "sampled", "per_example": "hooks"}
    estimate(models, "bert", tmp_path / "whole", **options)
    for batch_size in (2, 3):
        with monkeypatch.context() as patch:
            interrupt_after(patch, HooksEngine, 4)
            with pytest.raises(Interrupted):
                estimate(models, "bert", tmp_path / "f", batch_size=batch_size, **options)
    result = estimate(models, "bert", tmp_path / "f", **options)
    assert result["resumed_examples"] >= 10
    assert result["tokens"] == result["examples"] == 23
    whole = {name: value.double() for name, value in read(tmp_path / "whole").items()}
    names = [name for name in whole if not name.endswith("key.bias")]
    found = read(tmp_path / "f")
    assert_same({n: found[n] for n in names}, {n: whole[n] for n in names}, tolerance=1e-5)


def test_data_that_changed_meanwhile_is_refused(models, tmp_path, monkeypatch):
    from bigmerge.fisher.engines.hooks import HooksEngine

    data = save_csv(tmp_path / "d.csv", ROWS)
    options = {"batch_size": 2, "per_example": "hooks", "dataset": data}
    with monkeypatch.context() as patch:
        interrupt_after(patch, HooksEngine, 3)
        with pytest.raises(Interrupted):
            estimate(models, "bert", tmp_path / "f", **options)
    save_csv(data, [{**row, "text": "new " + row["text"]} for row in ROWS])
    with pytest.raises(ResumeError, match=r"dataset\.fingerprint"):
        estimate(models, "bert", tmp_path / "f", **options)


def test_an_error_in_the_middle_keeps_only_whole_batches(models, tmp_path, monkeypatch):
    from bigmerge.fisher.engines.hooks import HooksEngine

    options = {"batch_size": 2, "per_example": "hooks"}
    estimate(models, "bert", tmp_path / "whole", **options)
    original, calls = HooksEngine.add, []

    def add(self, batch):
        calls.append(batch.ids)
        if len(calls) == 6:
            for value in self.sums.values():
                value.fill_(1e9)  # sums are of no use after an error
            raise EstimationError("the gradient of row 3 is not finite")
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(HooksEngine, "add", add)
        with pytest.raises(EstimationError, match="row 3"):
            estimate(models, "bert", tmp_path / "f", save_every=0, **options)
    result = estimate(models, "bert", tmp_path / "f", save_every=0, **options)
    assert result["resumed_examples"] == 8  # the self-check was the first of the five calls before
    assert (tmp_path / "f" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
