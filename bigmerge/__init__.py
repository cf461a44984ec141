"""bigmerge: merge models that are larger than memory.

    import bigmerge

    bigmerge.estimate_fisher("path/to/model", "fishers/model", dataset="data.csv")
    bigmerge.merge(["shards/a", "shards/b"], "merged")

Everything heavy (torch, transformers) is imported where it is used, so importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bigmerge.fisher.api import estimate_fisher
    from bigmerge.merging.api import merge, plan_merge

_EXPORTS = {
    "estimate_fisher": "bigmerge.fisher.api",
    "merge": "bigmerge.merging.api",
    "plan_merge": "bigmerge.merging.api",
}

__all__ = ["__version__", "estimate_fisher", "merge", "plan_merge"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
