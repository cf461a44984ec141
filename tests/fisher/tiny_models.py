"""Tiny models, batches and score functions, and the slow reference that engines are held to."""

from __future__ import annotations

import copy

import torch

from bigmerge.fisher.batch import Batch, Scores

VOCAB = 23
LENGTHS = (7, 4, 6)


def shaken(model):
    """Give every weight a generic value: initial zeros and ones hide errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.25
            noise = torch.randn(parameter.shape, generator=generator) * scale
            center = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(center + noise)
    return model.eval()


def bert(labels=3):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return shaken(
        BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                max_position_embeddings=12,
                num_labels=labels,
                attn_implementation="eager",
            )
        )
    )


def albert():
    from transformers import AlbertConfig, AlbertForSequenceClassification

    return shaken(
        AlbertForSequenceClassification(
            AlbertConfig(
                vocab_size=VOCAB,
                embedding_size=8,
                hidden_size=16,
                num_hidden_layers=3,
                num_hidden_groups=1,
                num_attention_heads=2,
                intermediate_size=24,
                max_position_embeddings=12,
                num_labels=3,
                attn_implementation="eager",
            )
        )
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return shaken(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_positions=12,
                n_embd=16,
                n_layer=2,
                n_head=2,
                bos_token_id=0,
                eos_token_id=0,
                attn_implementation="eager",
            )
        )
    )


def _llama_like(name, head="ForCausalLM", **more):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=16,
        attn_implementation="eager",
        use_cache=False,
        pad_token_id=0,
        **more,
    )
    return shaken(getattr(transformers, name + head)(config))


def llama():
    return _llama_like("Llama", tie_word_embeddings=False)


def llama_tied():
    return _llama_like("Llama", tie_word_embeddings=True)


def llama_classifier():
    return _llama_like("Llama", "ForSequenceClassification", num_labels=3)


def qwen3():
    return _llama_like("Qwen3", head_dim=8, tie_word_embeddings=True)


def gemma3():
    """Norm weights around zero, scaled embeddings, tied head, sliding and full attention."""
    import transformers

    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="eager",
        use_cache=False,
        pad_token_id=0,
    )
    return shaken(transformers.Gemma3ForCausalLM(config))


def mixtral():
    return _llama_like("Mixtral", num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")


def qwen3_moe():
    return _llama_like(
        "Qwen3Moe",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        experts_implementation="eager",
    )


def token_batch(side="right", lengths=LENGTHS, seed=0, first_id=100):
    """Random token ids of several lengths, padded on one side; targets are a class per example."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(longest - length, longest)
        # few distinct ids, so that tokens repeat within an example
        ids[row, where] = torch.randint(1, VOCAB // 2, (length,), generator=generator)
        mask[row, where] = 1
    targets = torch.randint(0, 3, (len(lengths), 1), generator=generator)
    numbers = tuple(range(first_id, first_id + len(lengths)))
    return Batch(numbers, {"input_ids": ids, "attention_mask": mask}, targets)


def classify(model, batch):
    """One scored position per example."""
    logits = model(**batch.inputs).logits.unsqueeze(1)
    return Scores(logits, torch.ones(logits.shape[:2], dtype=torch.bool), batch.targets)


def predict_tokens(model, batch):
    """Every real token that follows a real token is scored."""
    mask = batch.inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(**batch.inputs, position_ids=positions).logits[:, :-1]
    scored = (mask[:, 1:] * mask[:, :-1]).bool()
    return Scores(logits, scored, batch.inputs["input_ids"][:, 1:])


def alone_without_padding(batch, index):
    one = batch.select(index, index + 1)
    mask = one.inputs.get("attention_mask")
    if mask is None:
        return one
    real = mask[0].bool()
    inputs = {name: value[:, real] for name, value in one.inputs.items()}
    return Batch(one.ids, inputs, one.targets)


def reference_squares(model, labels, score, batch):
    """Σ_n Σ_columns (J_nᵀ v)² in float64: one unpadded example at a time, one backward pass per column."""
    double = copy.deepcopy(model).double().eval().requires_grad_(True)
    parameters = dict(double.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for index in range(len(batch)):
        one = alone_without_padding(batch, index)
        wide = {
            name: value.double() if value.is_floating_point() else value for name, value in one.inputs.items()
        }
        one = Batch(one.ids, wide, one.targets)
        for v in labels.columns(score(double, one), one.ids):
            double.zero_grad(set_to_none=True)
            (score(double, one).logits * v).sum().backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    total[name] += parameter.grad.square()
    return total


def relative_errors(sums, reference):
    """‖sums − reference‖ / ‖reference‖ by name; tensors that are zero but for rounding are left out."""
    largest = max(float(value.norm()) for value in reference.values())
    errors = {}
    for name, expected in reference.items():
        got = sums[name].double()
        if float(expected.norm()) <= 1e-12 * largest:
            assert float(got.norm()) <= 1e-10 * largest, name
            continue
        errors[name] = float((got - expected).norm() / expected.norm())
    return errors
