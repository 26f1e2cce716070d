"""stable-pretraining's `spt run` gives its Manager an argument by the name that it had before."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

PACKAGE = "stable-pretraining"
VERSIONS = ">=0.1.8"
REASON = (
    "stable_pretraining.config passes resume_weights_only to Manager, whose argument is called "
    "weights_only, so that no configuration with trainer, module and data runs"
)
LINK = "https://github.com/galilai-group/stable-pretraining/pull/390"


def is_needed() -> bool:
    """Tell whether the configuration's side has the old name and the Manager has not.

    Never where stable-pretraining is not what runs: importing it takes seconds.
    """
    if "stable_pretraining.config" not in sys.modules:
        return False
    try:
        manager = importlib.import_module("stable_pretraining.manager").Manager
        config = importlib.import_module("stable_pretraining.config")
    except ImportError:
        return False
    passed = "resume_weights_only=" in inspect.getsource(config.instantiate_from_config)
    return passed and "resume_weights_only" not in _arguments(manager.__init__)


def _arguments(function: Any) -> set[str]:
    return set(inspect.signature(function, follow_wrapped=False).parameters)


def apply() -> Callable[[], None]:
    """Let the Manager take the argument by its old name too.

    Returns:
        What gives the Manager its own `__init__` back.
    """
    manager = importlib.import_module("stable_pretraining.manager").Manager
    before = manager.__init__

    @functools.wraps(before)
    def init(self: Any, *args: Any, resume_weights_only: bool | None = None, **named: Any) -> None:
        if resume_weights_only is not None:
            named["weights_only"] = resume_weights_only
        before(self, *args, **named)

    manager.__init__ = init

    def undo() -> None:
        manager.__init__ = before

    return undo
