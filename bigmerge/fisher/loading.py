"""The model under measurement: its checkpoint, config, tokenizer and task, checked before anything long starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigmerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from bigmerge.checkpoints.hub import download, is_hub_name
from bigmerge.errors import BigmergeError, CheckpointError, InputError, UsageError
from bigmerge.fisher.device_memory import device_memory
from bigmerge.fisher.tasks.base import TASKS, Task

logger = logging.getLogger("bigmerge.fisher")


@dataclass(frozen=True)
class Subject:
    """A model directory whose headers, config and tokenizer have been read; no weights yet.

    Attributes:
        name: what the user called it.
        checkpoint: its weight files.
        config: transformers' config object.
        tokenizer: transformers' tokenizer.
        task: class of the task it will be measured on.
    """

    name: str
    checkpoint: Checkpoint
    config: Any
    tokenizer: Any
    task: type[Task]

    @property
    def short_name(self) -> str:
        """The name to record: of a directory without the way there, of the hub in full."""
        return self.name if not Path(self.name).expanduser().exists() else self.checkpoint.root.resolve().name


def local_directory(model: str) -> Path:
    """The directory of a model given as a path or a hub name (which is downloaded).

    Raises:
        CheckpointError: it is neither, or a single file without the config a model needs.
    """
    path = Path(model).expanduser()
    if not path.exists() and is_hub_name(model):
        path = download(model)
    if not path.exists():
        raise CheckpointError(f"{model}: no such directory", file=model)
    if not path.is_dir():
        raise CheckpointError(
            f"{model}: is a file; running a model needs its config and tokenizer too",
            hint="give the directory that holds them beside the weights",
            file=model,
        )
    return path


def open_subject(model: str, task: str) -> Subject:
    """Read everything about a model that is not its weights.

    Args:
        model: directory or hub name.
        task: name of a task, or "auto".

    Raises:
        CheckpointError: the directory holds no usable model, or a quantized one.
        InputError: config or tokenizer is missing or not understood.
        UsageError: there is no such task, or none suits the model.
    """
    from transformers import AutoConfig, AutoTokenizer

    directory = local_directory(model)
    checkpoint = open_checkpoint(directory)
    with _quiet_transformers(), _understood(model, "config"):
        config = AutoConfig.from_pretrained(directory)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{model}: its weights are quantized; gradients with respect to them mean nothing",
            hint="measure the unquantized model",
            file=str(directory),
        )
    chosen = _task(config, task, model)
    with _quiet_transformers(), _understood(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
    _check_vocabulary(model, directory, tokenizer)
    return Subject(model, checkpoint, config, tokenizer, chosen)


def _check_vocabulary(model: str, directory: Path, tokenizer: Any) -> None:
    # Where the files are missing, transformers makes a tokenizer that knows no words and says nothing.
    needed = {*(tokenizer.vocab_files_names or {}).values()}
    present = {path.name for path in directory.iterdir()}
    if (
        needed
        and not present & (needed | {"tokenizer.json", "tekken.json"})
        and not any(name.endswith((".model", ".tiktoken")) or name.startswith("vocab.") for name in present)
    ):
        raise InputError(
            f"{model}: its tokenizer has no vocabulary file",
            hint=f"the directory must hold one of: {', '.join(sorted(needed))}",
            model=model,
        )


def _task(config: Any, task: str, model: str) -> type[Task]:
    if task != "auto":
        return TASKS.get(task)
    architectures = list(config.architectures or ())
    for candidate in TASKS:
        if candidate.suits(architectures):
            return candidate
    raise UsageError(
        f"{model}: its architecture ({', '.join(architectures) or 'none recorded'}) belongs to no known task",
        hint=f"a Fisher needs a model with a head; name the task with --task: {', '.join(TASKS.names())}",
        architectures=architectures,
    )


def load_model(subject: Subject, device: torch.device) -> torch.nn.Module:
    """The model with its head on `device`, in evaluation mode, every parameter from the checkpoint.

    float16 weights are computed with in float32, because squares of gradients underflow in float16; other
    dtypes stay.

    Raises:
        CheckpointError: the checkpoint lacks parameters (such as the head) or has others of another shape.
        InputError: transformers cannot load it.
        ResourceError: the device's memory does not hold it.
    """
    import transformers

    auto_class = getattr(transformers, subject.task.auto_class)
    dtypes = {spec.dtype for spec in subject.checkpoint.tensors.values()}
    dtype: Any = torch.float32 if "F16" in dtypes else "auto"
    with _quiet_transformers(), _understood(subject.name, "model"):
        model, report = auto_class.from_pretrained(
            subject.checkpoint.root,
            config=subject.config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _check_complete(subject, model, report)
    if unused := sorted(report["unexpected_keys"]):
        logger.info(
            "%s: %d tensors have no place in %s and get no Fisher: %s",
            subject.name,
            len(unused),
            type(model).__name__,
            _some(unused),
        )
    model.config.use_cache = False
    with device_memory("the model"):
        model.to(device)
    model.eval()
    assert isinstance(model, torch.nn.Module)
    return model


def _check_complete(subject: Subject, model: Any, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        backbone = f"{model.base_model_prefix}."
        head = all(not name.startswith(backbone) for name in missing)
        raise CheckpointError(
            f"{subject.name}: the checkpoint has no weights for {_some(missing)}, which "
            f"{type(model).__name__} needs",
            hint="it is a model without the task's head; fine-tune it first, or choose another --task"
            if head
            else "the checkpoint is incomplete or belongs to another architecture",
            model=subject.name,
            missing=missing,
        )
    mismatched = [str(item[0]) for item in report["mismatched_keys"]]
    if mismatched:
        raise CheckpointError(
            f"{subject.name}: the checkpoint's shapes are not those that its config describes: "
            f"{_some(sorted(mismatched))}",
            model=subject.name,
            mismatched=mismatched,
        )


def longest_input(model: Any, tokenizer: Any) -> int | None:
    """The most tokens the model and its tokenizer take; None where neither has a limit."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limits = [
        value
        for name in ("max_position_embeddings", "n_positions")
        if isinstance(value := getattr(config, name, None), int) and value > 0
    ]
    for name, module in model.named_modules():
        # Positions that start after a padding position (RoBERTa and its kin) leave fewer for tokens.
        if (
            isinstance(module, torch.nn.Embedding)
            and name.rsplit(".", 1)[-1] == "position_embeddings"
            and module.padding_idx is not None
        ):
            limits.append(module.num_embeddings - module.padding_idx - 1)
    # Tokenizers without a limit say so with a huge number.
    if isinstance(tokenizer.model_max_length, int) and 0 < tokenizer.model_max_length < 10**9:
        limits.append(tokenizer.model_max_length)
    return min(limits) if limits else None


def input_length(model: Any, tokenizer: Any, asked: int | None) -> int | None:
    """The length that inputs are cut to: what was asked for, else what the model takes.

    Raises:
        UsageError: more was asked for than the model has positions.
    """
    limit = longest_input(model, tokenizer)
    if asked is None:
        return limit
    if limit is not None and asked > limit:
        raise UsageError(
            f"--max-length {asked} is more than the {limit} tokens that the model takes",
            hint=f"leave it out, or give at most {limit}",
            asked=asked,
            limit=limit,
        )
    special = int(tokenizer.num_special_tokens_to_add(pair=False))
    if asked <= special:
        raise UsageError(
            f"--max-length {asked} leaves no room for text beside {special} special tokens",
            asked=asked,
        )
    return asked


@contextmanager
def _understood(model: str, what: str) -> Iterator[None]:
    """Turns whatever transformers raises while reading a file into one error with one line."""
    try:
        yield
    except (BigmergeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        custom = "trust_remote_code" in str(error)
        raise InputError(
            f"{model}: its {what} cannot be loaded ({lines[0] if lines else type(error).__name__})",
            hint="models that bring their own code are not run"
            if custom
            else f"the directory must hold the {what} as transformers saves it",
            model=model,
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the load reports and progress bars of transformers; what matters in them is checked here."""
    from transformers.utils import logging as chatter

    level = chatter.get_verbosity()
    bars = chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def _some(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
