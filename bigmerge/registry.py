"""Finds the parts of bigmerge that come one to a file: merge methods, layer rules, tasks, label sources.

Dropping a module with a concrete subclass into the package adds it; there is no list to edit. Other
distributions add theirs through an entry point of the registry's group that names the class.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from bigmerge.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Concrete subclasses of `base`, by their `name`, from the modules of `package` and an entry-point group.

    Args:
        kind: what one entry is called in messages, e.g. "merge method".
        package: dotted name of the package whose modules are searched; modules whose name starts with an
            underscore are skipped.
        base: the (abstract) class that entries derive from.
        group: entry-point group for other distributions.
    """

    def __init__(self, kind: str, package: str, base: Any, group: str) -> None:
        self.kind = kind
        self.package = package
        self.base = base
        self.group = group
        self._entries: dict[str, type[T]] | None = None

    def _load(self) -> dict[str, type[T]]:
        if self._entries is None:
            found: dict[str, type[T]] = {}
            for info in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                if info.name.startswith("_"):
                    continue
                module = importlib.import_module(f"{self.package}.{info.name}")
                for value in vars(module).values():
                    if (
                        inspect.isclass(value)
                        and value.__module__ == module.__name__
                        and issubclass(value, self.base)
                        and not inspect.isabstract(value)
                        and value is not self.base
                    ):
                        self._add(found, value)
            for point in entry_points(group=self.group):
                value = point.load()
                if not (inspect.isclass(value) and issubclass(value, self.base)):
                    raise TypeError(f"entry point {point.value} of {self.group} is no {self.base.__name__}")
                self._add(found, value)
            self._entries = dict(sorted(found.items()))
        return self._entries

    def _add(self, found: dict[str, type[T]], entry: Any) -> None:
        name: str = entry.name
        if name in found:
            raise TypeError(
                f"two {self.kind}s are named {name!r}: {found[name].__module__}, {entry.__module__}"
            )
        found[name] = entry

    def __iter__(self) -> Iterator[type[T]]:
        return iter(self._load().values())

    def names(self) -> list[str]:
        return list(self._load())

    def get(self, name: str) -> type[T]:
        """The entry called `name`.

        Raises:
            UsageError: there is none; the message names the nearest.
        """
        entries = self._load()
        if name not in entries:
            near = difflib.get_close_matches(name, entries, n=1)
            raise UsageError(
                f"there is no {self.kind} called {name!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(entries)}",
                name=name,
                known=list(entries),
            )
        return entries[name]
