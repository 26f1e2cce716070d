"""What is installed, what is found, and the command that gets what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cp_plugin.config.selection import GROUPS
from cp_plugin.config.settings import UserError
from cp_plugin.util.patching import patches
from cp_plugin.util.paths import shipped

PACKAGES = (
    *("torch", "torchvision", "lightning", "pytorch-lightning", "hydra-core", "lightly"),
    *("timm", "safetensors", "torchmetrics"),
)
OPTIONAL = ("pytorch-lightning", "torchmetrics")
FAISS = ("faiss-cpu", "faiss-gpu")
SOLO_NEEDS = {"einops": "einops", "sklearn": "scikit-learn", "wandb": "wandb", "scipy": "scipy"}


class Finding(NamedTuple):
    """One line of the report."""

    subject: str
    found: str
    remedy: str = ""
    """The command that mends it; empty where nothing is amiss."""


def examine() -> list[Finding]:
    """Look at the installation; nothing is changed or downloaded."""
    return [*_versions(), *_faiss(), *_device(), *_hosts(), *_patches(), *_groups(), *_hooks()]


def _versions() -> Iterator[Finding]:
    yield Finding("python", sys.version.split()[0])
    for package in ("cp-plugin", *PACKAGES):
        version = _version(package)
        missing = version is None and package not in OPTIONAL
        yield Finding(package, version or "-", f"pip install {package}" if missing else "")


def _faiss() -> Iterator[Finding]:
    found = [f"{name} {version}" for name in FAISS if (version := _version(name))]
    remedy = "" if len(found) == 1 else "pip install faiss-cpu, or faiss-gpu where there is a GPU"
    if len(found) > 1:
        remedy = "pip uninstall faiss-cpu faiss-gpu, then install one: both provide `faiss`"
    yield Finding("faiss", ", ".join(found) or "-", remedy)


def _device() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        yield Finding("device", ", ".join(names))
    else:
        yield Finding(
            "device", f"no GPU; {os.cpu_count()} CPU cores, {torch.get_num_threads()} used"
        )


def _hosts() -> Iterator[Finding]:
    lightly = importlib.util.find_spec("lightly")
    yield Finding("host Lightly", _place(lightly.origin) if lightly and lightly.origin else "-")
    root = solo_learn_root()
    if root is None:
        remedy = "git clone https://github.com/vturrisi/solo-learn; export PYTHONPATH=solo-learn"
        yield Finding("host solo-learn", "-", remedy)
        return
    importable = importlib.util.find_spec("solo") is not None
    where = str(root) if importable else f"{root}, not on PYTHONPATH"
    yield Finding("host solo-learn", where, "" if importable else f"export PYTHONPATH={root}")
    lacking = [pip for module, pip in SOLO_NEEDS.items() if not importlib.util.find_spec(module)]
    needs = f"pip install {' '.join(lacking)}" if lacking else ""
    yield Finding(
        "solo-learn's needs", f"missing: {', '.join(lacking)}" if lacking else "all", needs
    )


def solo_learn_root() -> Path | None:
    """Return the folder of a solo-learn: $SOLO_LEARN_ROOT, ~/solo-learn, or what is importable."""
    spec = importlib.util.find_spec("solo")
    places = [os.environ.get("SOLO_LEARN_ROOT"), "~/solo-learn"]
    if spec is not None and spec.origin:
        places.insert(0, str(Path(spec.origin).parent.parent))
    for place in places:
        if place and (Path(place).expanduser() / "solo" / "methods").is_dir():
            return Path(place).expanduser()
    return None


def _patches() -> Iterator[Finding]:
    for patch in patches():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the host that is looked at
                needed = patch.is_needed()
        except Exception as error:  # whatever a host says when it cannot be imported
            yield Finding(f"patch {patch.name}", f"cannot be told: {type(error).__name__}: {error}")
            continue
        state = "applied while a poison or monitor is selected" if needed else "not needed"
        version = f"{patch.package} {patch.installed() or '-'}, for {patch.versions}"
        why = f": {patch.reason} ({patch.link})" if needed else ""
        yield Finding(f"patch {patch.name}", f"{state}; {version}{why}")


def _groups() -> Iterator[Finding]:
    try:
        configs = shipped("configs")
    except FileNotFoundError as error:
        yield Finding("groups", str(error), "pip install --force-reinstall cp-plugin")
        return
    for group in GROUPS:
        names = sorted(path.stem for path in (configs / group).glob("*.yaml"))
        if names:
            yield Finding(f"group +{group}=", ", ".join(names))
    yield Finding("configurations", str(configs))


def _hooks() -> Iterator[Finding]:
    """Say whether Hydra and Lightning will find the plugin."""
    plugin = importlib.util.find_spec("hydra_plugins")
    found = plugin is not None and importlib.util.find_spec("hydra_plugins.cp_plugin") is not None
    again = "pip install --force-reinstall cp-plugin"
    yield Finding("Hydra plugin", "found" if found else "-", "" if found else again)
    for root in ("lightning.pytorch", "pytorch_lightning"):
        points = importlib.metadata.entry_points(group=f"{root}.callbacks_factory")
        known = any(point.name == "cp-plugin" for point in points)
        yield Finding(f"factory for {root}", "found" if known else "-", "" if known else again)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _place(origin: str) -> str:
    return str(Path(origin).parent)


def check(findings: list[Finding]) -> None:
    """Check that nothing that the package itself cannot do without is missing.

    Raises:
        UserError: with the commands that get it.
    """
    optional = ("host ", "solo-learn", "faiss")
    amiss = [f for f in findings if f.remedy and not f.subject.startswith(optional)]
    if amiss:
        raise UserError("; ".join(f"{f.subject} is missing: {f.remedy}" for f in amiss) + ".")
