"""What is exchanged in objects of others while a run lasts, and put back: one stack for all."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any

_MISSING = object()


class Exchanges(ExitStack):
    """Puts back on exit what was exchanged, the last first; may be filled again afterwards."""

    def entry(self, entries: MutableMapping[str, Any], name: str, value: Any) -> None:
        """Exchange an entry of a dictionary: globals, or `vars` of an object.

        Through `vars` an attribute is exchanged past a `__setattr__` that refuses or registers.
        """
        before = entries.get(name, _MISSING)
        self.callback(_put_back, entries, name, before)
        entries[name] = value

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Exchange an attribute that is there, by ordinary means: a property goes through."""
        self.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _put_back(entries: MutableMapping[str, Any], name: str, before: Any) -> None:
    if before is _MISSING:
        entries.pop(name, None)
    else:
        entries[name] = before
