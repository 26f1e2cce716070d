"""What a poison file says of how the poison was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cp_plugin.attack.loop import Schedule
from cp_plugin.config.settings import AlternationConfig, UserError
from cp_plugin.hosts.module import ModuleHost
from cp_plugin.mirror import Mirror
from cp_plugin.util.provenance import versions


def record(
    kind: str,
    host: ModuleHost,
    mirror: Mirror,
    config: AlternationConfig,
    schedule: Schedule,
    seed: int,
    parts_before: Sequence[Mapping[str, Any]],
    rows_not_moved: int,
) -> dict[str, str]:
    """Return the text of a poison file, by names.

    Args:
        kind: which poison it is.
        host: the surrogate.
        mirror: of the augmentations.
        config: the settings.
        schedule: as far as it has come.
        seed: of start and augmentations.
        parts_before: what made the perturbation that it started from, oldest first.
        rows_not_moved: rows that are as they started.
    """
    steps = {
        "rounds": schedule.rounds,
        "surrogates": config.restarts + 1,
        "joint": config.joint,
        "model_steps": schedule.model_steps,
        "noise_steps": schedule.noise_steps,
        "pgd_steps": schedule.pgd_steps,
        "step_size": config.step_size,
        "dual_branch": config.uses_dual_branch,
        "momentum_during_noise": "running" if config.runs_momentum else "frozen",
        "surrogate_steps_done": schedule.steps_done,
        "noise_steps_done": schedule.noise_steps_done,
        "rows_not_moved": rows_not_moved,
    }
    if config.granularity == "cluster":
        steps["clean_steps"] = schedule.clean_steps
    part = {
        "method": host.method,
        "model_steps": schedule.steps_done,
        "noise_steps": schedule.noise_steps_done,
    }
    covering = {} if config.fit == "crop" else {"fit": config.fit}
    return {
        "poison": kind,
        "host": getattr(host.module, "framework_name", host.framework),
        "method": host.method,
        "backbone": _backbone(host),
        "augmentations": repr(mirror),
        "schedule": json.dumps(steps),
        "parts": json.dumps([*parts_before, part]),
        "fraction": str(config.fraction),
        "seed": str(seed),
        "versions": json.dumps(versions()),
        **covering,
    }


def _backbone(host: ModuleHost) -> str:
    """Return the name of a backbone: the host's own word for it, else the class of its encoder."""
    named = getattr(host, "backbone_name", None) or getattr(host.module, "backbone_name", None)
    try:
        return str(named or type(host.encoder()).__name__)
    except UserError:
        return "unknown"
