"""From an override to callbacks in a trainer: what is selected, and for which application.

Hydra tells `start` of a job before the application's own `main` runs; Lightning asks
`trainer_callbacks` whenever a `Trainer` is made. Nothing heavy is imported until both a poison or
monitor is selected and the application is one that is served.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from cp_plugin.config.selection import GROUPS
from cp_plugin.config.settings import UserError
from cp_plugin.integrations.job import Job
from cp_plugin.util.paths import shipped
from cp_plugin.util.undo import Exchanges

OWN_APPLICATION = "cp_plugin.apps.hydra_app"
APPLICATIONS = {
    "solo.args": "cp_plugin.integrations.solo_learn:wrap_parser",
    "stable_pretraining.config": "cp_plugin.integrations.stable_pretraining:wrap_maker",
}
"""What enters an application, by a module that it has imported when its `main` runs."""
PROVIDER = "cp-plugin"
EXIT_CODE = 2


_job: Job | None = None
_own_application = False


def start(config: Any, task_function: Callable[..., Any]) -> None:
    """Prepare an application in which a poison, a defence or a monitor is selected.

    Ends the process with one sentence if the application is not one that is served: it would train
    clean under a poison's name.

    Args:
        config: Hydra's whole configuration.
        task_function: the application's `main`.
    """
    global _job
    function = inspect.unwrap(task_function)
    if function.__module__ == OWN_APPLICATION:
        return
    for library, entry in APPLICATIONS.items():
        if library in sys.modules:
            module, _, name = entry.partition(":")
            _job = Job()
            if getattr(importlib.import_module(module), name)(function, _job):
                _messages_shown(_job.exchanged)
                return
            _job = None
    stop(
        f"{_selected(config)} is selected, but {function.__module__}.{function.__qualname__} is "
        "not an application that cp-plugin serves, so nothing would be poisoned; use solo-learn's "
        "main_pretrain.py, stable-pretraining's `spt run`, `cp-plugin pretrain`, or CraftPoison as "
        "a callback in your own code."
    )


def finish(job_return: Any) -> None:
    """Put the application back after a job; a user's mistake ends it with one sentence.

    Args:
        job_return: Hydra's `JobReturn`.
    """
    global _job
    job, _job = _job, None
    if job is None:
        return
    job.exchanged.close()
    from cp_plugin.util.internals import job_result

    result = job_result(job_return)
    if isinstance(result, UserError):
        stop(str(result).rsplit("UserError: ", 1)[-1].strip())
    if not isinstance(result, BaseException) and job.trainers == 0:
        stop(
            "a poison, defence or monitor is selected, but the application has made no Lightning "
            "trainer."
        )


def trainer_callbacks() -> list[Any]:
    """Return the callbacks of a new trainer; the factory that Lightning calls.

    Ends the process with one sentence where a poison is chosen and was never activated, as in a
    sweep over the group itself.
    """
    if _job is not None and _job.callbacks is not None:
        _job.trainers += 1
        return _job.callbacks()
    chosen = None if _own_application else chosen_groups()
    if chosen:
        stop(
            f"{chosen} is chosen, but Hydra has not activated it, as in a sweep over the group "
            "itself, so this run would train clean under its name; sweep over other settings, give "
            "each poison a command of its own, or use `cp-plugin pretrain`, which sweeps freely."
        )
    return []


def chosen_groups() -> str | None:
    """Return `poison=cp` or the like if Hydra's running job has chosen it from our groups."""
    module = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return None
    runtime = module.HydraConfig.get().runtime
    chosen = [(group, runtime.choices.get(group)) for group in GROUPS]
    ours = [f"{group}={name}" for group, name in chosen if name and _is_ours(runtime, group, name)]
    return " ".join(ours) or None


@contextmanager
def own_application() -> Iterator[None]:
    """Mark trainers as those of `cp-plugin pretrain`, which brings its callbacks itself."""
    global _own_application
    before, _own_application = _own_application, True
    try:
        yield
    finally:
        _own_application = before


def stop(sentence: str) -> NoReturn:
    """End the process: Hydra turns every ordinary error of a callback into a warning."""
    print(f"cp-plugin: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CODE)


def _is_ours(runtime: Any, group: str, name: str) -> bool:
    """Tell whether the first source that has this group's file is this package."""
    for source in runtime.config_sources:
        if source.schema == "file" and (Path(source.path) / group / f"{name}.yaml").is_file():
            return bool(source.provider == PROVIDER)
    return (shipped("configs") / group / f"{name}.yaml").is_file()


def _selected(config: Any) -> str:
    choices = config.hydra.runtime.choices
    return " ".join(f"{group}={choices[group]}" for group in GROUPS if choices.get(group))


def _messages_shown(exchanged: Exchanges) -> None:
    """Show the package's messages, until the job ends, where the application shows none."""
    logger = logging.getLogger("cp_plugin")
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("cp-plugin: %(message)s"))
    first_process = os.environ.get("LOCAL_RANK", "0") == "0"
    exchanged.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.INFO if first_process else logging.WARNING)
    exchanged.callback(logger.removeHandler, handler)
    logger.addHandler(handler)
    # solo-learn's `logging.warn` gives the root logger a handler.
    exchanged.attribute(logger, "propagate", False)
    # Hydra's logging of a job disables what was there before.
    exchanged.attribute(logger, "disabled", False)
