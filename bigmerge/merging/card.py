"""The model card (README.md) of a merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from bigmerge import __version__
from bigmerge.merging.plan import Plan, describe_exceptions

_SOURCE_LINES = 64


def model_card(plan: Plan, sources: Sequence[Mapping[str, Any]]) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        sources: for each model its "name", "weight", "content" digest and perhaps "fisher", as in the manifest.
    """
    recipe = plan.recipe
    front: dict[str, Any] = {"tags": ["merge", "bigmerge"]}
    if recipe.sources[recipe.target].checkpoint.config is not None:
        front["library_name"] = "transformers"
    hub_names = [source.hub_name.partition("@")[0] for source in recipe.sources if source.hub_name]
    if hub_names:
        front["base_model"] = hub_names
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        "# Merged model",
        "",
        f"Made with bigmerge {__version__} by the method `{recipe.method.name}`: {recipe.method.summary}"
        f" ({recipe.method.source}).",
        "",
        "| model | λ | content digest | Fisher |",
        "|---|---|---|---|",
    ]
    for source in sources[:_SOURCE_LINES]:
        fisher = source.get("fisher")
        lines.append(
            f"| {source['name']} | {source['weight']:g} | `{source['content']}` | "
            + (f"`{fisher['content']}`" if fisher else "—")
            + " |"
        )
    if len(sources) > _SOURCE_LINES:
        lines.append(f"| … and {len(sources) - _SOURCE_LINES} more, see bigmerge.json | | | |")
    lines += [
        "",
        f"{len(plan.alignment.merged)} tensors were merged.",
        *(
            ["Not merged:", "", *(f"- {line.strip()}" for line in describe_exceptions(plan.alignment))]
            if plan.alignment.kept or plan.alignment.dropped
            else []
        ),
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(recipe.describe(), indent=2, ensure_ascii=False),
        "```",
        "",
        "`bigmerge verify` checks these files against the digests in `bigmerge.json`.",
        "",
    ]
    return "\n".join(lines)
