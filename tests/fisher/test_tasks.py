"""Tasks: what is read from a row, padding, the position that is scored, and errors."""

from __future__ import annotations

import pytest
import torch
from tiny_checkpoints import VOCABULARY, save_bert, save_llama, save_tokenizer

from bigmerge.errors import DatasetError, InputError
from bigmerge.fisher.tasks.base import TASKS, TaskSettings

SEQUENCE = TASKS.get("sequence-classification")
CAUSAL = TASKS.get("causal-lm")
TEXTS = ["the cat sat", "a dog", "the very old bird flew over the house", "new"]


def load(auto_class, directory):
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(directory).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory)


def build(task, model, tokenizer, columns=("text",), **settings):
    built = task(TaskSettings(**settings), model.config, tokenizer)
    built.check_columns(columns)
    return built


def batch_of(task, texts, labels=None):
    found = [
        (i, task.encode({"text": text, "label": labels[i] if labels else None}, i))
        for i, text in enumerate(texts)
    ]
    return task.collate(found)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return load(SEQUENCE.auto_class, save_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(CAUSAL.auto_class, save_llama(tmp_path_factory.mktemp("llama")))


def classifier(kind, tmp_path):
    """A tiny decoder with a classification head whose config has no padding id."""
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3
        )
    elif kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=3,
        )
    else:
        config = transformers.XLNetConfig(
            vocab_size=len(VOCABULARY), d_model=16, n_layer=2, n_head=2, d_inner=24, num_labels=3
        )
    config.pad_token_id = None if kind != "xlnet" else 0
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    save_tokenizer(tmp_path, kind="plain", padding_side="left", pad=kind == "xlnet")
    return model, transformers.AutoTokenizer.from_pretrained(tmp_path)


# -- finding the task and the columns --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("BertForSequenceClassification", ["sequence-classification"]),
        ("LlamaForCausalLM", ["causal-lm"]),
        ("GPT2LMHeadModel", ["causal-lm"]),
        ("BertModel", []),
    ],
)
def test_architectures(architecture, names):
    assert [task.name for task in TASKS if task.suits([architecture])] == names


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["idx", "sentence", "label"], ("sentence",)),
        (["sentence1", "sentence2", "label"], ("sentence1", "sentence2")),
        (["premise", "hypothesis", "label"], ("premise", "hypothesis")),
        (["label", "content of the mail"], ("content of the mail",)),
    ],
)
def test_text_columns_are_guessed(bert, columns, found):
    task = SEQUENCE(TaskSettings(), bert[0].config, bert[1])
    assert task.check_columns(columns) == found


def test_ambiguous_and_missing_columns_are_errors(bert):
    model, tokenizer = bert
    with pytest.raises(DatasetError, match="no column that is clearly the text") as caught:
        SEQUENCE(TaskSettings(), model.config, tokenizer).check_columns(["one", "two", "label"])
    assert "one, two, label" in str(caught.value)
    with pytest.raises(DatasetError, match="no column 'body'"):
        SEQUENCE(TaskSettings(("body",)), model.config, tokenizer).check_columns(["text"])
    with pytest.raises(DatasetError, match="no column 'kind'"):
        SEQUENCE(TaskSettings(label_column="kind"), model.config, tokenizer).check_columns(["text"])
    with pytest.raises(DatasetError, match="no label column"):
        SEQUENCE(TaskSettings(needs_labels=True), model.config, tokenizer).check_columns(["text"])
    with pytest.raises(DatasetError, match="causal-lm takes one"):
        CAUSAL(TaskSettings(("a", "b")), model.config, tokenizer).check_columns(["a", "b"])


def test_labels_are_read_only_when_they_are_needed(bert):
    task = build(SEQUENCE, *bert, columns=["text", "label"])
    assert task.check_columns(["text", "label"]) == ("text",)
    assert task.encode({"text": "the cat"}, 0)["target"] == -100
    needing = SEQUENCE(TaskSettings(needs_labels=True), bert[0].config, bert[1])
    assert needing.check_columns(["text", "label"]) == ("text", "label")


@pytest.mark.parametrize(("value", "label"), [(2, 2), ("1", 1), ("LABEL_2", 2), (1.0, 1), (True, 1)])
def test_labels_of_many_kinds(bert, value, label):
    task = build(SEQUENCE, *bert, columns=["text", "label"], needs_labels=True)
    assert task.encode({"text": "the cat", "label": value}, 0)["target"] == label


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "outside the model's head"),
        (-1, "outside"),
        ("cat", "none of the model's classes"),
        (None, "none of"),
    ],
)
def test_unusable_labels_name_the_row(bert, value, message):
    task = build(SEQUENCE, *bert, columns=["text", "label"], needs_labels=True)
    with pytest.raises(DatasetError, match=message) as caught:
        task.encode({"text": "the cat", "label": value}, 17)
    assert caught.value.data["row"] == 17


def test_unusable_text_names_the_row(bert):
    with pytest.raises(DatasetError, match="row 4: column 'text' holds nothing"):
        build(SEQUENCE, *bert).encode({"text": None}, 4)
    assert build(SEQUENCE, *bert).encode({"text": 12}, 4)["input_ids"] == [2, 1, 3]


def test_models_that_are_no_classifiers_are_refused(bert):
    import copy

    model, tokenizer = bert
    for field, value, message in (
        ("problem_type", "multi_label_classification", "multi-label"),
        ("num_labels", 1, "regression"),
    ):
        config = copy.deepcopy(model.config)
        setattr(config, field, value)
        with pytest.raises(InputError, match=message):
            SEQUENCE(TaskSettings(), config, tokenizer).check_model(model)
    build(SEQUENCE, model, tokenizer).check_model(model)


def test_an_encoder_is_no_language_model(llama):
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(InputError, match="no causal model"):
        build(CAUSAL, transformers.BertLMHeadModel(config).eval(), llama[1]).check_model(
            transformers.BertLMHeadModel(config).eval()
        )
    config.is_decoder = True
    decoder = transformers.BertLMHeadModel(config).eval()
    build(CAUSAL, decoder, llama[1]).check_model(decoder)
    build(CAUSAL, *llama).check_model(llama[0])


@pytest.mark.parametrize(("classes", "labels"), [(16, "exact"), (17, "sampled")])
def test_default_labels(bert, classes, labels):
    import copy

    config = copy.deepcopy(bert[0].config)
    config.num_labels = classes
    assert SEQUENCE(TaskSettings(), config, bert[1]).default_labels() == labels
    assert CAUSAL(TaskSettings(), config, bert[1]).default_labels() == "sampled"


# -- inputs ----------------------------------------------------------------------------------------------


def test_pairs_get_their_token_types(bert):
    task = build(SEQUENCE, *bert, columns=["premise", "hypothesis"])
    encoded = task.encode({"premise": "the cat", "hypothesis": "a dog"}, 0)
    ids = [2, *(VOCABULARY.index(word) for word in ("the", "cat")), 3]
    ids += [*(VOCABULARY.index(word) for word in ("a", "dog")), 3]
    assert encoded["input_ids"] == ids
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_truncation_keeps_the_special_tokens(bert):
    task = build(SEQUENCE, *bert, max_length=4)
    assert len(task.encode({"text": TEXTS[2]}, 0)["input_ids"]) == 4
    assert task.encode({"text": TEXTS[2]}, 0)["input_ids"][-1] == 3


def test_classifier_scores_do_not_depend_on_the_batch(bert):
    model, tokenizer = bert
    task = build(SEQUENCE, model, tokenizer)
    together = task.score(model, batch_of(task, TEXTS))
    assert together.logits.shape == (4, 1, 3)
    assert together.scored.all()
    for i, text in enumerate(TEXTS):
        alone = model(**tokenizer(text, return_tensors="pt")).logits
        torch.testing.assert_close(together.logits[i], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "xlnet"])
def test_decoders_are_scored_at_their_last_token(tmp_path, kind):
    """Without a padding id in the config, and with texts that end in what would be the padding."""
    model, tokenizer = classifier(kind, tmp_path)
    task = build(SEQUENCE, model, tokenizer)
    texts = [*TEXTS, "the cat [EOS]", "[UNK]", "[EOS] [EOS] the [PAD]"]
    before = model.config.pad_token_id
    together = task.score(model, batch_of(task, texts)).logits[:, 0]
    assert model.config.pad_token_id == before
    same_length = task.score(model, batch_of(task, TEXTS[:1] * 2)).logits[:, 0]
    for i, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        model.config.pad_token_id = None  # one unpadded text: the last position is scored
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        model.config.pad_token_id = before
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-6)
        if i == 0:
            torch.testing.assert_close(same_length[1], alone, rtol=1e-4, atol=1e-6)


def test_a_padding_id_in_the_config_is_the_models_own_rule(tmp_path):
    model, tokenizer = classifier("llama", tmp_path)
    model.config.pad_token_id = 4
    task = build(SEQUENCE, model, tokenizer)
    logits = task.score(model, batch_of(task, ["the cat [EOS]", "the cat", TEXTS[2]])).logits[:, 0]
    torch.testing.assert_close(logits[0], logits[1])  # an end token is not looked at, by that rule


@pytest.mark.parametrize("side", ["left", "right"])
def test_language_model_scores_every_predicted_token(tmp_path, side):
    model, tokenizer = load(CAUSAL.auto_class, save_llama(tmp_path / "m", padding_side=side))
    task = build(CAUSAL, model, tokenizer)
    batch = batch_of(task, TEXTS)
    scores = task.score(model, batch)
    width = max(len(text.split()) for text in TEXTS)
    assert scores.logits.shape == (4, width - 1, len(VOCABULARY))
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        predicted = ids.shape[1] - 1
        assert int(scores.scored[i].sum()) == predicted == task.positions(task.encode({"text": text}, i))
        alone = model(input_ids=ids).logits[0, :-1]
        torch.testing.assert_close(scores.logits[i][scores.scored[i]], alone, rtol=1e-4, atol=1e-6)
        assert scores.targets[i][scores.scored[i]].tolist() == ids[0, 1:].tolist()


def test_learned_positions_with_a_left_padding_tokenizer(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=32
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    save_tokenizer(tmp_path, kind="plain", padding_side="left", pad=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    task = build(CAUSAL, model, tokenizer)
    scores = task.score(model, batch_of(task, TEXTS))
    for i, text in enumerate(TEXTS):
        alone = model(**tokenizer(text, return_tensors="pt")).logits[0, :-1]
        torch.testing.assert_close(scores.logits[i][scores.scored[i]], alone, rtol=1e-4, atol=1e-6)


def test_batches_can_be_taken_apart(llama):
    """What engines do when a batch is too large: slices keep their padding and score the same."""
    model, tokenizer = llama
    task = build(CAUSAL, model, tokenizer)
    batch = batch_of(task, TEXTS)
    whole = task.score(model, batch)
    part = task.score(model, batch.select(1, 3))
    assert part.scored.equal(whole.scored[1:3])
    torch.testing.assert_close(part.logits[part.scored], whole.logits[1:3][part.scored], rtol=1e-4, atol=1e-6)
