"""Tiny models with a tokenizer, saved as transformers saves them, and small data sets for them."""

from __future__ import annotations

import csv
import random
from pathlib import Path

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "over", "mat", "house"]
WORDS += ["tree", "red", "blue", "old", "new", "very", "and"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
VOCABULARY = SPECIAL + WORDS


def save_tokenizer(directory: Path, *, kind: str, padding_side: str = "right", pad: bool = True) -> None:
    """A word-level tokenizer; `kind` "bert" adds [CLS] and [SEP], "plain" adds nothing and has an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]"}
    if pad:
        special["pad_token"] = "[PAD]"
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        names = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        special |= {"eos_token": "[EOS]"}
        names = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side=padding_side, model_input_names=names, **special
    ).save_pretrained(directory)


def save_bert(
    directory: Path, *, num_labels: int = 3, seed: int = 0, head: bool = True, **config: object
) -> Path:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(seed)
    settings = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=num_labels,
        **config,
    )
    model = BertForSequenceClassification(settings) if head else BertModel(settings)
    model.save_pretrained(directory)
    save_tokenizer(directory, kind="bert")
    return directory


def save_llama(
    directory: Path, *, seed: int = 0, tied: bool = True, padding_side: str = "left", pad: bool = False
) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=4,
        pad_token_id=None,
    )
    LlamaForCausalLM(settings).save_pretrained(directory)
    save_tokenizer(directory, kind="plain", padding_side=padding_side, pad=pad)
    return directory


def rows(count: int, *, seed: int = 0, classes: int = 3) -> list[dict[str, object]]:
    chooser = random.Random(seed)
    return [
        {
            "text": " ".join(chooser.choice(WORDS) for _ in range(chooser.randint(2, 12))),
            "label": chooser.randrange(classes),
        }
        for _ in range(count)
    ]


def save_csv(path: Path, content: list[dict[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(content[0]))
        writer.writeheader()
        writer.writerows(content)
    return path
