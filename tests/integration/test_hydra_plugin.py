"""The groups resolve in any Hydra application, from wheel and checkout; unselected, nothing is."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APPLICATION = """
import sys
import hydra
from omegaconf import OmegaConf

@hydra.main(version_base="1.2", config_path=None, config_name=None)
def main(cfg):
    print(OmegaConf.to_yaml(cfg), end="")
    print("torch" in sys.modules)

main()
"""


def run(application: Path, *overrides: str, path: str = "") -> subprocess.CompletedProcess[str]:
    flags = [override for override in overrides if override.startswith("--")]
    overrides = tuple(override for override in overrides if override not in flags)
    command = [sys.executable, str(application), *flags]
    command += ["hydra.run.dir=.", "hydra.output_subdir=null"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path}
    return subprocess.run(
        [*command, "hydra/job_logging=disabled", *overrides],
        cwd=application.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def application(tmp_path):
    file = tmp_path / "application.py"
    file.write_text(APPLICATION)
    return file


def test_an_application_that_selects_nothing_is_as_if_the_plugin_were_not_there(application):
    found = run(application, "+lr=1")
    assert (found.stdout, found.returncode) == ("lr: 1\nFalse\n", 0)


def test_the_groups_resolve_in_any_application(application):
    found = run(application, "--cfg=job", "+poison=cp_class", "+monitor=knn", "poison.rounds=3")
    assert found.returncode == 0, found.stderr
    assert "name: cp_class" in found.stdout
    assert "rounds: 3" in found.stdout
    assert "every_n_epochs" in found.stdout


@pytest.mark.parametrize("override", ["+poison=cp", "+poison=none", "+monitor=knn"])
def test_an_application_that_is_not_served_does_not_run_clean(application, override):
    found = run(application, override)
    assert (found.stdout, found.returncode) == ("", 2)
    assert found.stderr.startswith(
        f"cp-plugin: {override[1:]} is selected, but __main__.main is not"
    )
    assert len(found.stderr.splitlines()) == 1


def test_an_application_with_a_group_of_its_own_of_that_name_is_left_alone(application):
    (application.parent / "poison").mkdir()
    (application.parent / "poison" / "cp.yaml").write_text("own: 1\n")
    application.write_text(application.read_text().replace("config_path=None", "config_path='.'"))
    found = run(application, "+poison=cp")
    assert (found.stdout, found.returncode) == ("poison:\n  own: 1\nFalse\n", 0)


def test_an_unknown_key_is_refused_by_hydra(application):
    found = run(application, "+poison=cp", "poison.epsilon=1")
    assert found.returncode != 0
    assert "epsilon" in found.stderr


@pytest.mark.slow
def test_a_wheel_carries_configurations_patches_and_the_plugin(application, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for expected in (
        "hydra_plugins/cp_plugin.py",
        "cp_plugin/configs/poison/cp.yaml",
        "cp_plugin/configs/pretrain/simclr.yaml",
        "cp_plugin/patches/__init__.py",
        "cp_plugin/patches/compute_on_step.py",
        "cp_plugin/patches/resume_weights_only.py",
    ):
        assert expected in names
    chosen = ["+poison=inject", "poison.path=x"]
    found = run(application, "--cfg=job", *chosen, path=str(tmp_path / "site"))
    assert found.returncode == 0, found.stderr
    assert "path: x" in found.stdout


def test_the_command_does_not_shadow_cp():
    scripts = Path(sys.executable).parent
    assert (scripts / "cp-plugin").exists()
    assert not (scripts / "cp").exists()
