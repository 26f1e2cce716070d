"""What importing a module brings along, each in a process of its own."""

import subprocess
import sys

import pytest

IMPORTS = [
    *[
        (name, ("torch", "faiss", "timm", "lightning", "lightly", "matplotlib"))
        for name in ("cp_plugin", "hydra_plugins.cp_plugin", "cp_plugin.apps.cli")
    ],
    *[
        (name, ("lightning", "pytorch_lightning", "hydra", "lightly"))
        for name in ("cp_plugin.loop", "cp_plugin.apps.protect")
    ],
]


@pytest.mark.parametrize(("module", "heavy"), IMPORTS, ids=[name for name, _ in IMPORTS])
def test_importing_loads_nothing_heavy(module: str, heavy: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules], end='')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("[]", "")
