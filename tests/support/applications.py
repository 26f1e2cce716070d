"""Applications run in this process: solo-learn's own, and ours."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hydra.core.global_hydra import GlobalHydra

CPU = (
    *("accelerator=cpu", 'devices="1"', "strategy=auto", "precision=32", "sync_batchnorm=False"),
    *("wandb.enabled=False", "data.num_workers=0"),
)
SMALL = (
    *("backbone.name=timm/resnet18", "+backbone.kwargs={layers:[1,1,1,1],channels:[16,16,32,32]}"),
    *("max_epochs=1", "optimizer.batch_size=8", "method_kwargs.proj_hidden_dim=16"),
    "method_kwargs.proj_output_dim=8",
)
NATIVE = ("backbone.name=resnet18", "~backbone.kwargs")
CRAFT = ("poison.rounds=2", "poison.model_steps=2", "poison.noise_steps=1", "poison.pgd_steps=1")


class Ran(NamedTuple):
    """What an application left."""

    code: int
    out: str
    err: str


def ran(main: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> Ran:
    """Call an application; environment, Hydra and logging are as before when it has ended."""
    capsys.readouterr()
    code: Any = 0
    with mock.patch.dict(os.environ), _loggers_kept():
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        finally:
            GlobalHydra.instance().clear()
    return Ran(code or 0, *capsys.readouterr())


@contextmanager
def _loggers_kept() -> Iterator[None]:
    named = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    before = [(each.level, each.handlers[:], each.propagate, each.disabled) for each in named]
    try:
        yield
    finally:
        for logger, (level, handlers, propagate, disabled) in zip(named, before, strict=True):
            for added in set(logger.handlers) - set(handlers):
                added.close()
            logger.setLevel(level)
            logger.handlers, logger.propagate, logger.disabled = handlers, propagate, disabled


class Stock:
    """`main_pretrain.py` and `main_linear.py` of a checkout, from its own YAML."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.root, self._monkeypatch, self._capsys = root, monkeypatch, capsys

    def pretrain(self, yaml: str, *overrides: str, flags: tuple[str, ...] = ()) -> Ran:
        """Run `scripts/pretrain/<yaml>`, its data folders given in `overrides`."""
        folder, name = yaml.split("/")
        where = ["--config-path", f"{self.root}/scripts/pretrain/{folder}", "--config-name", name]
        return self.call("main_pretrain", *where, *flags, *CPU, *SMALL, *overrides)

    def call(self, script: str, *arguments: str) -> Ran:
        """Call an application's `main` with a command line."""
        main = self.module(script).main
        self._monkeypatch.setattr(sys, "argv", [f"{self.root}/{script}.py", *arguments])
        return ran(main, self._capsys)

    def module(self, script: str) -> Any:
        """Load a script once."""
        name = f"solo_learn_{script}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, self.root / f"{script}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[name] = module
        return sys.modules[name]


def custom(train: Path, val: Path | None = None) -> tuple[str, ...]:
    """Overrides for a folder of images as the data set."""
    return (
        "data.dataset=custom",
        f"data.train_path={train}",
        f"data.val_path={'null' if val is None else val}",
    )


def only(folder: Path, pattern: str) -> Path:
    """The one file below a folder that matches."""
    (found,) = folder.rglob(pattern)
    return found
