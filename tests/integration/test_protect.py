"""`cp-plugin protect`: folders of real pictures of mixed kinds, interrupted, with mistakes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cp_plugin import Poison
from cp_plugin.apps.export import export
from cp_plugin.apps.protect import protect
from cp_plugin.apps.protect.plan import Settings
from cp_plugin.attack.start import start
from cp_plugin.config.settings import CraftConfig, UserError
from cp_plugin.data import FlatFolder, RawDataset
from cp_plugin.engine.placement import Placement
from tests.support.mixed_pictures import BROKEN, KINDS, write_broken, write_mixed

pytestmark = [pytest.mark.filterwarnings("ignore")]

CHECK = Path(__file__).parent.parent / "support" / "check_protected.py"
SMALL = (
    "augmentations.0.crop_size=32",
    "backbone.kwargs.channels=[8,8,8,8]",
    "method_kwargs.proj_hidden_dim=16",
)
QUICK = Settings(size=64, rounds=2, clusters=None, overrides=SMALL)
COMMAND = [sys.executable, "-m", "cp_plugin.apps.cli", "protect"]
OPTIONS = [
    "--size",
    "64",
    "--rounds",
    "4",
    "--clusters",
    "3",
    *(word for one in SMALL for word in ("--set", one)),
]


def checked(originals: Path, out: Path, eps: str = "8/255") -> dict[str, object]:
    """Return what the script that shares no code with the package finds."""
    command = [sys.executable, str(CHECK), str(originals), str(out), eps]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout, ran.stderr
    found: dict[str, object] = json.loads(ran.stdout)
    return found


def hashes(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty files of sixteen kinds, two of which differ by their ending alone."""
    root = tmp_path_factory.mktemp("pictures") / "in"
    files = write_mixed(root, 80)
    Image.open(files[0]).convert("RGB").save(files[0].with_suffix(".jpg"))
    return root


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """The folder protected by a short craft."""
    out = folder.with_name("out")
    before = hashes(folder)
    assert protect([folder], out, QUICK) == 81
    assert hashes(folder) == before
    return out


def test_tree_sizes_modes_and_budget(folder: Path, made: Path) -> None:
    assert checked(folder, made) == {"checked": 81, "wrong": {}}
    assert {path.suffix for path in made.rglob("*.*")} == {".png", ".tif"}


def test_names_that_would_collide_keep_their_ending(folder: Path, made: Path) -> None:
    first = next(folder.rglob("photo 0000.png")).relative_to(folder)
    assert (made / first).is_file()
    assert (made / first.with_name("photo 0000.jpg.png")).is_file()


def test_nothing_but_pictures_is_published(made: Path) -> None:
    """The poison lies beside, since who has it can take it off again."""
    assert not [path for path in made.rglob("*") if path.name.startswith(".")]
    assert (made.with_name("out-poison") / "poison.safetensors").is_file()
    assert not (made.with_name("out-poison") / "pictures").exists()


def test_how_it_looks_is_said_and_shown(
    folder: Path, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Changes of at most 8 levels are at least 30 dB away, by the definition of PSNR."""
    caplog.set_level("INFO", "cp_plugin")
    poison = made.with_name("out-poison") / "poison.safetensors"
    one = next(folder.rglob("photo 0001.jpg"))
    protect([one], tmp_path / "one", QUICK, poison)
    found = re.search(
        r"1 pictures beside their originals: PSNR ([\d.]+) dB, SSIM ([\d.]+)", caplog.text
    )
    assert found is not None
    assert float(found[1]) >= 30
    assert 0 < float(found[2]) <= 1
    with Image.open(one) as picture, Image.open(tmp_path / "one-poison" / "looks.png") as sheet:
        assert max(picture.size) < 256, "it is shown at its own size"
        assert sheet.size == (3 * picture.width, picture.height)


def test_same_call_again_changes_nothing(folder: Path, made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert protect([folder], made, QUICK) == 81
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_other_settings_are_refused(folder: Path, made: Path) -> None:
    with pytest.raises(UserError, match=r"was begun with rounds=2; make the same call"):
        protect([folder], made, replace(QUICK, rounds=3))


def test_with_a_poison_of_these_pictures(folder: Path, made: Path, tmp_path: Path) -> None:
    """The poison is found by the pictures themselves; a lost file is made again, bit for bit."""
    poison = made.with_name("out-poison") / "poison.safetensors"
    count = protect([folder], tmp_path / "again", QUICK, poison)
    assert count == 81
    again = {
        str(Path(name).relative_to(tmp_path / "again")): digest
        for name, digest in hashes(tmp_path / "again").items()
    }
    assert again == {
        str(Path(name).relative_to(made)): digest for name, digest in hashes(made).items()
    }


def test_formats_stay_where_that_is_asked_for(
    folder: Path, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    poison = made.with_name("out-poison") / "poison.safetensors"
    protect([folder], tmp_path / "same", QUICK, poison, "same")
    suffixes = {path.suffix for path in (tmp_path / "same").rglob("*.*")}
    assert suffixes == {".png", ".jpg", ".webp", ".tif"}
    assert "JPEG is lossy" in caplog.text
    wrong: dict[str, list[str]] = checked(folder, tmp_path / "same")["wrong"]  # type: ignore[assignment]
    assert all(name.endswith(".jpg") for name in wrong)  # all others keep the budget


def test_single_files(folder: Path, made: Path, tmp_path: Path) -> None:
    poison = made.with_name("out-poison") / "poison.safetensors"
    one = next(folder.rglob("photo 0001.jpg"))
    assert protect([one], tmp_path / "one", QUICK, poison) == 1
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["photo 0001.png"]


@pytest.mark.parametrize("skip", [False, True])
def test_broken_files_are_named(
    folder: Path, tmp_path: Path, skip: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_broken(tmp_path / "broken")
    for file in folder.rglob("*"):
        if file.is_file() and "photo 007" not in file.name:
            (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    if not skip:
        with pytest.raises(UserError, match=r"5 files cannot be protected") as error:
            protect([tmp_path / "broken"], tmp_path / "out", QUICK)
        assert all(name in str(error.value) for name in BROKEN)
        assert "giant.png (too large" in str(error.value)
        assert not (tmp_path / "out").exists()
        return
    assert protect([tmp_path / "broken"], tmp_path / "out", QUICK, None, "png", True) == 71
    assert all(name in caplog.text for name in BROKEN)


def test_few_pictures_are_told_to_use_another_poison(folder: Path, tmp_path: Path) -> None:
    one = next(folder.rglob("photo 0001.jpg"))
    with pytest.raises(
        UserError, match=r"1 pictures are too few to train on, 64 are needed.*--with"
    ):
        protect([one], tmp_path / "out", QUICK)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda root: ([root / "none"], root / "out"), "there is no file or folder"),
        (lambda root: ([root / "in"], root / "in" / "out"), "whose files stay as they are"),
        (lambda root: ([root / "in"], root / "full"), "is not empty"),
        (lambda root: ([root / "void"], root / "out"), "there are no pictures"),
        (lambda root: ([root / "in", root / "in"], root / "out"), "files of the same name"),
    ],
)
def test_mistakes(
    tmp_path: Path, call: Callable[[Path], tuple[list[Path], Path]], sentence: str
) -> None:
    write_mixed(tmp_path / "in", 2)
    write_mixed(tmp_path / "full", 2)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=sentence):
        protect(*call(tmp_path), QUICK)


@pytest.mark.slow
def test_killed_at_any_time_the_same_call_goes_on(folder: Path, tmp_path: Path) -> None:
    """While it crafts and while it writes; what is in OUT is whole."""
    out = tmp_path / "out"
    poison = tmp_path / "out-poison"
    command = [*COMMAND, str(folder), str(out), *OPTIONS]
    for sign in (poison / "pictures" / "aspects.npy", poison / "poison.safetensors", out):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 240
        while not sign.exists():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for file in out.rglob("*.*"):
            with Image.open(file) as image:
                image.load()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"81 protected pictures in {out}\n"
    assert checked(folder, out) == {"checked": 81, "wrong": {}}


def test_minutes_are_planned_and_kept(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of the steps that are measured nothing is said but that they are."""
    caplog.set_level("INFO", "cp_plugin")
    began = time.monotonic()
    settings = Settings(size=32, minutes=0.5, overrides=SMALL)
    protect([folder], tmp_path / "out", settings)
    assert time.monotonic() - began < 0.5 * 60 * 1.2
    plan = json.loads((tmp_path / "out-poison" / "plan.json").read_text())
    assert plan["rounds"] >= 1
    assert plan["seconds_a_step"] > 0
    before = [record.message for record in caplog.records]
    before = before[: next(n for n, text in enumerate(before) if text.startswith("planned:"))]
    assert before == ["measuring 6 steps of training, to plan how many there is time for"]
    assert capfd.readouterr().err.count("simclr cp: step 1/") == 1


@pytest.fixture(scope="module")
def by_cluster(folder: Path) -> Path:
    out = folder.with_name("clustered")
    assert protect([folder], out, replace(QUICK, clusters=3)) == 81
    return out


def test_clusters_share_a_perturbation(folder: Path, by_cluster: Path) -> None:
    poison = Poison.load(by_cluster.with_name("clustered-poison") / "poison.safetensors")
    assert poison.classes == ("cluster 0", "cluster 1", "cluster 2")
    assert poison.fit == "cover"
    assert Placement.of(poison) is not None
    assert checked(folder, by_cluster) == {"checked": 81, "wrong": {}}


def test_a_poison_of_clusters_knows_its_pictures_without_labels(
    folder: Path, by_cluster: Path, tmp_path: Path
) -> None:
    """What `export` writes of the unlabelled folder is what `protect` has written."""
    poison = by_cluster.with_name("clustered-poison") / "poison.safetensors"
    assert export(poison, tmp_path / "out", folder) == 81
    made = {
        str(Path(file).relative_to(tmp_path / "out")): found
        for file, found in hashes(tmp_path / "out").items()
    }
    assert made == {
        str(Path(file).relative_to(by_cluster)): found for file, found in hashes(by_cluster).items()
    }


def test_single_pictures_start_from_the_perturbation_of_their_cluster(
    folder: Path, by_cluster: Path, tmp_path: Path
) -> None:
    file = by_cluster.with_name("clustered-poison") / "poison.safetensors"
    raw = RawDataset(FlatFolder(folder), 64, "cover")
    config = CraftConfig(init=str(file), fit="cover", image_size=64, dtype="float32")
    begun = start(raw, None, config, 0, tmp_path, None)
    poison = Poison.load(file)
    keys = [raw[row].key for row in range(len(raw))]
    theirs = poison.perturbation.gather(poison.rows(keys=keys))
    assert len(theirs.flatten(1).unique(dim=0)) == 3
    assert torch.equal(begun.perturbation.gather(begun.rows.of_image), theirs)


def test_pictures_taken_later_get_the_perturbation_of_their_cluster(
    folder: Path, by_cluster: Path, tmp_path: Path
) -> None:
    """Nothing is crafted, and one picture is enough; known ones come out as they did."""
    poison_file = by_cluster.with_name("clustered-poison") / "poison.safetensors"
    one = next(folder.rglob("photo 0003.png"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "known.png").write_bytes(one.read_bytes())
    write_mixed(tmp_path / "in" / "new", 6, side=60)
    assert protect([tmp_path / "in"], tmp_path / "out", QUICK, poison_file) == 7
    assert checked(tmp_path / "in", tmp_path / "out") == {"checked": 7, "wrong": {}}
    before = by_cluster / one.relative_to(folder)
    assert (tmp_path / "out" / "known.png").read_bytes() == before.read_bytes()


def test_pictures_that_were_protected_are_not_protected_again(
    by_cluster: Path, tmp_path: Path
) -> None:
    poison_file = by_cluster.with_name("clustered-poison") / "poison.safetensors"
    with pytest.raises(UserError, match="carries a perturbation of this poison already"):
        protect([by_cluster], tmp_path / "out", QUICK, poison_file)
    # Black and white pixels alone take half of delta at most, and their own detail drowns it.
    kinds = {KINDS[int(file.stem[-4:]) % len(KINDS)] for file in (tmp_path / "out").rglob("*.png")}
    assert kinds <= {"bits.png"}


def test_what_is_there_already_needs_nothing_that_trains(
    folder: Path, by_cluster: Path, tmp_path: Path
) -> None:
    """What trains a network takes longer to import than a hundred pictures take to write."""
    poison = by_cluster.with_name("clustered-poison") / "poison.safetensors"
    one = next(folder.rglob("photo 0003.png"))
    call = ["cp-plugin", "protect", str(one), str(tmp_path / "out"), "--with", str(poison)]
    heavy = ("lightning", "pytorch_lightning", "lightly", "hydra", "faiss", "numba", "matplotlib")
    program = (
        f"import sys; sys.argv = {call!r}\n"
        "from cp_plugin.apps.cli import main\n"
        "try:\n    main()\n"
        f"finally:\n    print([name for name in {heavy!r} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == f"1 protected pictures in {tmp_path / 'out'}\n[]\n", ran.stderr


def test_a_poison_of_single_pictures_is_not_for_others(made: Path, tmp_path: Path) -> None:
    write_mixed(tmp_path / "in", 2, side=60)
    poison = made.with_name("out-poison") / "poison.safetensors"
    with pytest.raises(UserError, match=r"has no perturbation for it.*--clusters"):
        protect([tmp_path / "in"], tmp_path / "out", QUICK, poison)
