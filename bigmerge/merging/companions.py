"""The files beside the weights: configuration, tokenizer, chat template, custom code, licence.

They come from the target, since the result has its architecture and vocabulary.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from bigmerge.checkpoints.checkpoint import WEIGHT_SUFFIXES
from bigmerge.checkpoints.dtypes import torch_dtype
from bigmerge.errors import OutputError
from bigmerge.merging.recipe import Recipe
from bigmerge.storage.writing import write_json

_WANTED = re.compile(
    r"(.+\.(json|jsonl|txt|model|jinja|tiktoken|spm|bpe|vocab|py)|(LICEN[CS]E|NOTICE|USE_POLICY).*)"
)
_UNWANTED = re.compile(
    r"(.*\.index\.json|bigmerge.*\.json|fisher_info\.json|trainer_state\.json|training_args\.json|"
    r".*_results\.json|requirements\.txt|\..*)"
)
_SUBDIRECTORIES = ("additional_chat_templates",)


def copy_companions(recipe: Recipe, output: Path) -> list[str]:
    """Copy the target's companion files into `output`; returns their names, sorted.

    The output dtype, if one was asked for, is written into config.json.

    Raises:
        OutputError: a file cannot be copied.
    """
    root = recipe.sources[recipe.target].checkpoint.root
    if not root.is_dir():
        return []
    names = [path.name for path in root.iterdir() if path.is_file() and _is_companion(path.name)]
    for directory in _SUBDIRECTORIES:
        if (root / directory).is_dir():
            (output / directory).mkdir(exist_ok=True)
            names += [
                f"{directory}/{path.name}" for path in (root / directory).iterdir() if path.suffix == ".jinja"
            ]
    for name in names:
        try:
            # copyfile follows the hub cache's links; modes and times are not copied, they are no content.
            shutil.copyfile(root / name, output / name)
        except OSError as error:
            raise OutputError(f"{output / name}: cannot be written ({error.strerror})", file=name) from error
    if recipe.dtype is not None and "config.json" in names:
        config = json.loads((output / "config.json").read_text(encoding="utf-8"))
        dtype = str(torch_dtype(recipe.dtype)).removeprefix("torch.")
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = dtype
        write_json(output / "config.json", config)
    return sorted(names)


def _is_companion(name: str) -> bool:
    return (
        _WANTED.fullmatch(name) is not None
        and _UNWANTED.fullmatch(name) is None
        and not name.endswith(WEIGHT_SUFFIXES)
    )
