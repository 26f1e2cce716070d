"""Studies: which cells a grid has, and that they survive crashes, kills and a second call."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cp_plugin.apps.study import study
from cp_plugin.apps.study.plan import by_level, check, plan
from cp_plugin.apps.study.settings import parse, read
from cp_plugin.apps.study.state import CRASHED, FAILED, FINISHED, RUNNING, Folder, write
from cp_plugin.apps.study.watch import Watch
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, RawDataset
from cp_plugin.engine import run
from cp_plugin.engine.methods import METHODS
from cp_plugin.util.paths import shipped
from cp_plugin.util.seed import derived_seed

CP_CLASS = ["+poison=cp_class", "poison.rounds=2", "poison.model_steps=2", "poison.noise_steps=1"]
VALUES = {
    "name": "small",
    "base": ["data.num_workers=0"],
    "victim": ["max_epochs=2"],
    "methods": {"byol": ["optimizer.lr=0.1"]},
    "backbones": {"tiny": ["backbone.kwargs.channels=[8,8,8,8]"], "full": []},
    "poisons": {
        "random": {"settings": ["+poison=random"], "drawn": True},
        "cp_class": {"settings": CP_CLASS, "chain": 2},
        "cp": {"settings": ["+poison=cp"], "init": "cp_class", "surrogate": "byol"},
    },
    "defences": {"other": ["optimizer.weight_decay=0"]},
    "grid": [
        {"poisons": ["none", "random", "cp_class"], "victims": ["simclr", "byol"], "seeds": [0]},
    ],
}


def values(**changes):
    return {**json.loads(json.dumps(VALUES)), **changes}


def grid(**axes):
    return values(grid=[{"poisons": ["none"], "victims": ["simclr"], "seeds": [0], **axes}])


def test_a_grid_has_the_cells_that_a_hand_made_list_has():
    cells = plan(parse(grid(poisons=["none", "random", "cp_class", "cp"], backbones=["tiny"])))
    levels = [sorted(cell.name for cell in group) for group in by_level(cells)]
    assert levels == [
        [
            "clean-simclr-tiny-0",
            "craft-cp_class-byol-tiny-0-1",
            "craft-cp_class-simclr-tiny-0-1",
        ],
        [
            "craft-cp_class-byol-tiny-0-2",
            "craft-cp_class-simclr-tiny-0-2",
            "victim-simclr-tiny-random-none-0",
        ],
        ["craft-cp-byol-tiny-0", "victim-simclr-tiny-cp_class-simclr-none-0"],
        ["victim-simclr-tiny-cp-byol-none-0"],
    ]
    assert cells["craft-cp-byol-tiny-0"].needs == {"poison": "craft-cp_class-byol-tiny-0-2"}
    assert cells["victim-simclr-tiny-cp-byol-none-0"].needs == {
        "poison": "craft-cp-byol-tiny-0",
        "clean": "clean-simclr-tiny-0",
    }


def test_axes_multiply_and_crafts_and_clean_runs_are_shared():
    axes = {
        "poisons": ["cp_class"],
        "victims": ["simclr", "mocov2plus", "byol"],
        "surrogates": ["simclr", "byol"],
        "defences": ["none", "other"],
        "seeds": [0, 1],
    }
    cells = list(plan(parse(grid(**axes))).values())
    # 2 backbones; crafts: 2 surrogates x 2 seeds x 2 in the chain, on the first backbone.
    kinds = [cell.kind for cell in cells]
    assert (kinds.count("craft"), kinds.count("clean"), kinds.count("victim")) == (8, 24, 48)


def test_a_cells_overrides_are_those_of_its_names_in_order():
    cells = plan(parse(grid(poisons=["cp_class"], victims=["byol"], defences=["other"], seeds=[7])))
    assert cells["victim-byol-tiny-cp_class-simclr-other-7"].overrides == (
        "data.num_workers=0",
        "backbone.kwargs.channels=[8,8,8,8]",
        "optimizer.lr=0.1",
        "max_epochs=2",
        "optimizer.weight_decay=0",
        "seed=7",
        "+poison=inject",
    )
    seed = f"seed={derived_seed(7, 'cp_class', 2)}"
    crafts = ("data.num_workers=0", "backbone.kwargs.channels=[8,8,8,8]", seed, *CP_CLASS)
    assert cells["craft-cp_class-simclr-tiny-7-2"].overrides == crafts


def test_a_digest_changes_with_the_settings_of_what_a_cell_needs():
    def digests(changed):
        settings = parse(changed)
        return {name: cell.digest for name, cell in plan(settings).items()}

    before = digests(values())
    changed = values()
    changed["poisons"]["cp_class"]["settings"] = [*CP_CLASS, "poison.eps=4/255"]
    after = digests(changed)
    differ = {name for name in before if before[name] != after[name]}
    assert differ == {name for name in before if "cp_class" in name}


def test_the_study_of_the_photographs_has_what_it_is_to_show():
    cells = plan(read("photos")).values()
    undefended = {
        (cell.poison, cell.victim, cell.seed)
        for cell in cells
        if cell.kind != "craft" and cell.defence == "none"
    }
    poisons = ("none", "random", "synthetic", "cp_class", "cp", "error_min", "tap")
    victims = ("simclr", "mocov2plus", "byol", "supervised")
    assert undefended == {
        (poison, victim, seed) for poison in poisons for victim in victims for seed in (0, 1)
    }
    defended = {
        (cell.poison, cell.victim, cell.defence, cell.seed)
        for cell in cells
        if cell.defence != "none"
    }
    served = {
        **dict.fromkeys(("matrix_completion", "adversarial"), victims),
        **dict.fromkeys(("noise", "smoothing", "cutout"), ("simclr",)),
        **dict.fromkeys(("mixup", "cutmix", "dp_sgd"), ("supervised",)),
    }
    assert defended == {
        (poison, victim, defence, 0)
        for poison in ("none", "cp_class")
        for defence, trained in served.items()
        for victim in trained
    }


def test_the_field_has_every_poison_victim_and_defence_within_one_budget(monkeypatch):
    monkeypatch.setenv("CIFAR10", ".")
    settings = read("field")
    groups = shipped("configs")
    own = {path.stem for path in (groups / "poison").glob("*.yaml")}
    others = {"inject", "none", "cp_byol", "cp_class_byol"}  # the last two: of one surrogate
    assert settings.poisons.keys() - {"none"} == own - others
    defences = {path.stem for path in (groups / "defence").glob("*.yaml")}
    defences -= {"diffusion"}  # its weights are the user's, and a study names none
    assert settings.defences.keys() == defences
    crafts = {name: cell for name, cell in plan(settings).items() if cell.kind == "craft"}
    check(crafts)  # they compose; victims differ from those of other studies by a name
    assert {cell.poison for cell in crafts.values()} == own - others - {"random", "synthetic"}
    cells = [cell for cell in plan(settings).values() if cell.kind != "craft"]
    found = {(cell.poison, cell.victim, cell.defence) for cell in cells}
    for method in METHODS:
        for poison in settings.poisons:
            for defence in defences:
                needs_labels = defence in ("mixup", "cutmix", "dp_sgd")
                served = method == "supervised" or not needs_labels
                assert ((poison, method, defence) in found) == served
    assert not [cell for cell in cells if any("poison.eps" in text for text in cell.overrides)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"grid": []}, "grid must be a list"),
        ({"girds": []}, "did you mean grid"),
        ({"base": "x"}, "base must be a list"),
        ({"base": [1]}, "base must be a list of overrides"),
        ({"poisons": {"none": {"settings": []}}}, "poisons.none is always there"),
        ({"poisons": {"a/b": {"settings": []}}}, "letters, digits and underscores"),
        ({"poisons": {"a": {"settings": ["x=1"], "chain": 0}}}, "num_surrogates must be"),
        ({"poisons": {"a": {"settings": ["x=1"], "init": "b"}}}, "poisons.a.init names 'b'"),
        ({"poisons": {"a": {"settings": ["x=1"], "drawn": True, "chain": 2}}}, "no surrogate"),
        (grid(poisons=["cp_clas"]), "did you mean cp_class"),
        (grid(defences=["othr"]), "did you mean other"),
        (grid(backbones=["huge"]), "grid.0.backbones names 'huge'"),
        (grid(seeds=["a"]), "seeds must be whole numbers"),
        (grid(seed=[1]), "did you mean seeds"),
        ({"grid": [{"poisons": ["none"], "victims": ["simclr"]}]}, "no grid.0.seeds"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(changes, text):
    with pytest.raises(UserError, match=text.replace("[", r"\[")) as error:
        parse(values(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("axes", "changes", "text"),
    [
        ({"victims": ["simclear"]}, {}, "simclear"),
        ({"victims": ["simclr"]}, {"victim": ["max_epoch=3"]}, "max_epoch"),
        ({"victims": ["simclr"]}, {"base": ["data.val_path=${oc.env:NO_SUCH}"]}, "NO_SUCH"),
        ({"poisons": ["random"]}, {"poisons": {"random": ["+poison=radnom"]}}, "radnom"),
        ({"poisons": ["cp_class"], "surrogates": ["mocco"]}, {}, "mocco"),
        ({"defences": ["other"]}, {"defences": {"other": ["optimizer.name=sgdd"]}}, "sgdd"),
    ],
)
def test_an_unknown_name_in_a_cell_stops_the_study_before_a_run(axes, changes, text, tmp_path):
    changed = grid(**axes)
    for key, value in changes.items():
        if key == "poisons":
            changed["poisons"]["random"]["settings"] = value["random"]
        else:
            changed[key] = value
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=text) as error:
        study(str(file), tmp_path / "out")
    assert "in the study's cell" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no study phtos; give a YAML file, or one of: .*photos"):
        study("phtos")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="no YAML file"):
        study("broken.yaml")


def test_only_hydra_is_set_on_the_command_line(tmp_path):
    with pytest.raises(UserError, match=r"overrides for Hydra alone.*max_epochs=3"):
        study("photos", tmp_path / "out", ["max_epochs=3"])


@pytest.mark.parametrize(
    "name", ["photos", "cifar10", "cifar10_gpu", "schedules", "rows", "augment", "demo", "protect"]
)
def test_the_cells_of_the_shipped_studies_that_need_no_defence_compose(name, monkeypatch):
    monkeypatch.setenv("CIFAR10", ".")
    monkeypatch.setenv("PICTURES", ".")
    cells = plan(read(name)).values()
    cells = [cell for cell in cells if cell.defence == "none" and cell.seed == 0]
    composed = []

    def kept(cfg):
        composed.append(own_check(cfg))
        return composed[-1]

    own_check = run.check
    monkeypatch.setattr(run, "check", kept)
    for cell in cells:
        check({cell.name: cell})
        selection, cfg = composed.pop()
        assert selection.crafts == (cell.kind == "craft")
        assert f"+poison={selection.name}" in cell.overrides
        assert (selection.name == "inject") == (cell.kind == "victim" and bool(cell.surrogate))
        assert cfg.method == (cell.surrogate if cell.victim is None else cell.victim)
        assert f"seed={cfg.seed}" in cell.overrides


# --- What outlives a process: cells are run by a script that dies as it is told.

DYING = """
import os, signal, sys
from pathlib import Path
from cp_plugin.apps.study.state import Folder
folder, call = Folder(Path(sys.argv[1])), sys.argv[2]
cells = list(folder.plan().values())
fatal = {fatal!r}
for status in (None, "crashed"):
    batch = [cell for cell in cells if folder.status(cell, call) == status]
    if status is None and {together}:
        for cell in batch:
            folder.note(cell, "running", call)
    for cell in batch:
        folder.note(cell, "running", call)
        if cell.name in fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        folder.note(cell, "finished", call)
"""


class Dying(Watch):
    """A watch whose cells do nothing, but for some that kill their process."""

    program = ""

    def _start(self, command, log):
        arguments = [sys.executable, "-c", self.program, *command[3:]]
        return subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def place(tmp_path):
    folder = Folder(tmp_path / "out")
    cells = plan(parse(grid(poisons=["none", "random"], seeds=[0, 1], backbones=["tiny"])))
    write(folder.path / "study.json", {"cells": [cell.plain() for cell in cells.values()]})
    return folder, cells


def statuses(folder, cells):
    return {name: folder.state(cell).get("status") for name, cell in cells.items()}


@pytest.mark.parametrize("together", [False, True])
def test_a_cell_that_brings_its_process_down_does_not_stop_the_rest(place, together):
    folder, cells = place
    fatal = "clean-simclr-tiny-0"
    watch = Dying(folder, cells, ())
    watch.program = DYING.format(fatal=[fatal], together=together)
    watch.run()
    expected = dict.fromkeys(cells, FINISHED) | {fatal: FAILED}
    assert statuses(folder, cells) == expected
    assert watch.shortfalls() == {fatal: "its process ended by SIGKILL, see study.log"}

    again = Dying(folder, cells, ())  # the next call tries it again
    again.program = DYING.format(fatal=[], together=together)
    before = {name: folder.state(cell)["time"] for name, cell in cells.items()}
    again.run()
    after = {name: folder.state(cell)["time"] for name, cell in cells.items()}
    assert statuses(folder, cells) == dict.fromkeys(cells, FINISHED)
    assert {name for name in cells if before[name] != after[name]} == {fatal}


def test_a_launcher_that_begins_no_cell_is_an_error_and_not_a_loop(place):
    folder, cells = place
    watch = Dying(folder, cells, ())
    watch.program = "raise SystemExit('no such queue')"
    with pytest.raises(UserError, match=r"before a cell was begun; .*no such queue"):
        watch.run()


def test_a_cell_at_work_elsewhere_is_not_taken_for_dead(place):
    folder, cells = place
    cell = next(iter(cells.values()))
    assert not folder.is_locked(cell)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]);"
            "lock.acquire(); print(flush=True); time.sleep(60)",
            folder.lock(cell.name).lock_file,
        ],
        stdout=subprocess.PIPE,
    )
    with holder:
        holder.stdout.readline()
        assert folder.is_locked(cell)
        holder.kill()
    assert not folder.is_locked(cell)


def test_two_calls_in_one_folder_are_refused(tmp_path):
    folder = Folder(tmp_path / "out")
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(grid()))
    with folder.lock(), pytest.raises(UserError, match="another process is at work"):
        study(str(file), tmp_path / "out")


def test_a_result_of_other_settings_counts_for_nothing(place):
    folder, cells = place
    cell = next(iter(cells.values()))
    folder.note(cell, FINISHED, "call")
    assert folder.status(cell, "later") == FINISHED
    other = plan(parse(grid(poisons=["none"], backbones=["tiny"]) | {"victim": ["max_epochs=3"]}))
    assert folder.status(other[cell.name], "later") is None
    folder.note(cell, RUNNING, "call")
    assert folder.status(cell, "later") is None
    folder.note(cell, CRASHED, "later")
    assert folder.status(cell, "later") == CRASHED


# --- The whole command, killed.


def start(folder, *more):
    command = [
        sys.executable,
        "-m",
        "cp_plugin.apps.cli",
        "study",
        "mine.yaml",
        "--out",
        "out",
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(pattern, folder, process):
    deadline = time.monotonic() + 240
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, (folder / "out/study.log").read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(tmp_path, image_folder):
    images = image_folder()
    base = [
        "data=custom",
        f"data.train_path={images}",
        f"data.val_path={images}",
        "data.num_workers=0",
        "backbone.kwargs.channels=[8,8,8,8]",
        "optimizer.batch_size=6",
        "checkpoint.frequency=1",
    ]
    mine = {
        "base": base,
        "victim": ["max_epochs=60", "+monitor=knn", "monitor.every_n_epochs=30"],
        "methods": {"byol": [f"data.train_path={tmp_path / 'later'}"]},
        "poisons": {"cp_class": {"settings": [*CP_CLASS, "max_epochs=100"]}},
        "grid": [{"poisons": ["none", "cp_class"], "victims": ["byol", "simclr"], "seeds": [0]}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(mine))

    with start(tmp_path) as process:
        wait_for("out/runs/simclr/victim-simclr-*/last.ckpt", tmp_path, process)
        process.send_signal(signal.SIGKILL)
    done = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("out/cells/*.json")}
    states = {name: json.loads((tmp_path / "out/cells" / name).read_text()) for name in done}
    assert states["clean-byol-default-0.json"]["status"] == FAILED
    assert "later" in states["clean-byol-default-0.json"]["reason"]
    killed = "victim-simclr-default-cp_class-simclr-none-0.json"
    assert states[killed]["status"] == RUNNING

    shutil.copytree(images, tmp_path / "later")  # what the failed cell lacked
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"] if _has_joblib() else []
    with start(tmp_path, *launcher) as again:
        _, error = again.communicate(timeout=240)
    assert again.returncode == 0, error
    assert "2 of 5 cells are finished; going on with the rest" in error
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["unfinished"] == {}
    cells = {cell["name"]: cell for cell in result["cells"]}
    assert cells[killed.removesuffix(".json")]["result"]["resumed_from_step"] > 0
    for name in ("clean-simclr-default-0", "craft-cp_class-simclr-default-0"):
        file = tmp_path / "out/cells" / f"{name}.json"
        assert file.stat().st_mtime_ns == done[file.name]
    _check_the_measures(tmp_path / "out", cells)


def _has_joblib():
    try:
        import hydra_plugins.hydra_joblib_launcher  # noqa: F401
    except ImportError:
        return False
    return True


def _check_the_measures(out: Path, cells):
    """The control is the clean encoder of the same victim and seed, on the victim's poison."""
    from cp_plugin import Poison
    from cp_plugin.apps.evaluate_run import evaluate

    victim = cells["victim-simclr-default-cp_class-simclr-none-0"]
    folders = {name: out / cell["folder"] for name, cell in cells.items()}
    poison = Poison.load(folders["craft-cp_class-simclr-default-0"] / "poison.safetensors")
    (control,) = victim["control"]
    clean = evaluate(folders["clean-simclr-default-0"], poison)
    assert control == clean[1]
    assert [row["bank"] for row in victim["banks"]] == ["clean", "poisoned"]
    last = victim["result"]["knn"][-1]
    assert victim["banks"][1]["knn"]["accuracy"] == pytest.approx(last["knn_poisoned_bank"])


def test_entries_of_the_grid_are_run_one_after_the_other():
    first = {"poisons": ["cp_class"], "victims": ["simclr"], "backbones": ["tiny"], "seeds": [0]}
    second = {**first, "poisons": ["none", "random"], "victims": ["byol", "simclr"]}
    levels = [
        [cell.name for cell in group]
        for group in by_level(plan(parse(values(grid=[first, second]))))
    ]
    assert levels == [
        ["craft-cp_class-simclr-tiny-0-1", "clean-simclr-tiny-0"],
        ["craft-cp_class-simclr-tiny-0-2"],
        ["victim-simclr-tiny-cp_class-simclr-none-0"],
        ["clean-byol-tiny-0"],
        ["victim-byol-tiny-random-none-0", "victim-simclr-tiny-random-none-0"],
    ]


def test_victims_of_all_seeds_share_a_craft_with_a_seed():
    poisons = {"cp_class": {"settings": CP_CLASS, "seed": 7}}
    axes = {"poisons": ["cp_class"], "victims": ["simclr"], "backbones": ["tiny"], "seeds": [0, 1]}
    cells = plan(parse(values(poisons=poisons, grid=[axes])))
    crafts = [cell for cell in cells.values() if cell.kind == "craft"]
    assert [cell.name for cell in crafts] == ["craft-cp_class-simclr-tiny-7"]
    victims = [cell for cell in cells.values() if cell.kind == "victim"]
    assert [cell.needs["poison"] for cell in victims] == [crafts[0].name] * 2


def test_poisons_made_on_different_backbones_are_different_cells():
    axes = {"poisons": ["random", "cp_class"], "victims": ["simclr"], "seeds": [0]}
    there = {**axes, "backbones": ["tiny", "full"]}
    back = {**axes, "backbones": ["full", "tiny"]}
    cells = plan(parse(values(grid=[there, back])))
    names = [name for name in cells if name.startswith("victim-simclr-tiny-")]
    assert names == [
        "victim-simclr-tiny-random-none-0",
        "victim-simclr-tiny-cp_class-simclr-none-0",
        "victim-simclr-tiny-cp_class-simclr-none-0-made_on_full",
    ]
    transferred = cells[names[-1]]
    assert transferred.surrogate_backbone == "full"
    assert transferred.needs["poison"] == "craft-cp_class-simclr-full-0-2"


def saved_poison(path, seed=0):
    """Write a class poison of the photographs' classes, noise of a seed."""
    names, generator = Photos(train=True).classes, torch.Generator().manual_seed(seed)
    rows = Perturbation.uniform(len(names), (3, 32, 32), 8 / 255, generator=generator)
    return Poison(rows, "class", None, tuple(names), {"poison": "cp"}).save(path)


def test_a_given_poison_goes_to_victims_from_beside_the_file(tmp_path):
    file = tmp_path / "given.safetensors"
    saved_poison(file)
    small = "backbone.kwargs={layers:[1,1,1,1],channels:[8,8,8,8],stem_type:deep,stem_width:4}"
    content = {
        "base": ["data.num_workers=0", small, "max_epochs=1"],
        "poisons": {"given": {"file": "given.safetensors"}},
        "probe": "none",
        "grid": [{"poisons": ["given"], "victims": ["simclr"], "seeds": [0]}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    (named,) = (c for c in plan(read(str(tmp_path / "mine.yaml"))).values() if c.kind == "victim")
    result = study(str(tmp_path / "mine.yaml"), tmp_path / "out")
    assert result["unfinished"] == {}
    assert str(tmp_path) not in json.dumps(result["settings"])
    (victim,) = (cell for cell in result["cells"] if cell["kind"] == "victim")
    assert {bank["bank"] for bank in victim["banks"]} == {"clean", "poisoned"}
    assert victim["surrogate"] is None
    file.unlink()
    saved_poison(file, seed=1)
    (later,) = (c for c in plan(read(str(tmp_path / "mine.yaml"))).values() if c.kind == "victim")
    assert later.digest != named.digest


def test_a_craft_starts_from_a_given_poison(tmp_path):
    given = saved_poison(tmp_path / "given.safetensors")
    few = ["poison.rounds=1", "poison.pgd_steps=1", "poison.step_size=0.001", "max_epochs=20"]
    small = "backbone.kwargs={layers:[1,1,1,1],channels:[8,8,8,8],stem_type:deep,stem_width:4}"
    cp = {"settings": ["+poison=cp", *few], "init": "given"}
    content = {
        "base": ["data.num_workers=0", small, "max_epochs=1"],
        "poisons": {"given": {"file": "given.safetensors"}, "cp": cp},
        "probe": "none",
        "grid": [{"poisons": ["cp"], "victims": ["simclr"], "seeds": [0]}],
    }
    twice = content | {"poisons": content["poisons"] | {"cp": cp | {"num_surrogates": 2}}}
    cells = plan(parse(twice | {"name": "twice"}, tmp_path)).values()
    first, second = (cell for cell in cells if cell.kind == "craft")
    assert (second.file, dict(second.needs)) == (None, {"poison": first.name})
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    result = study(str(tmp_path / "mine.yaml"), tmp_path / "out")
    assert result["unfinished"] == {}
    (craft,) = (cell for cell in result["cells"] if cell["kind"] == "craft")
    made = Poison.load(tmp_path / "out" / craft["folder"] / "poison.safetensors")
    start, photos = Poison.load(given), Photos(train=True)
    raw = RawDataset(photos, made.size)
    for number in range(0, len(photos), 300):
        row = made.perturbation.gather(made.rows([raw[number].key]))
        name = photos.classes[photos[number][1]]
        of_class = start.perturbation.gather(start.rows(classes=[name]))
        torch.testing.assert_close(row, of_class, rtol=0, atol=0.01 * made.eps)


@pytest.mark.parametrize(
    ("node", "text"),
    [
        ({"file": "missing.safetensors"}, "not beside the study's file"),
        ({"file": "../given.safetensors"}, "no path"),
        ({"file": "/etc/given.safetensors"}, "no path"),
        ({"file": "given.pth"}, "no path"),
        ({"file": "given.safetensors", "settings": ["+poison=cp"]}, "leave its other keys out"),
    ],
)
def test_a_given_poison_that_is_not_there_is_refused(node, text, tmp_path):
    (tmp_path / "given.safetensors").touch()
    with pytest.raises(UserError, match=text):
        parse(values(poisons={"given": node}, grid=grid()["grid"]), tmp_path)
    with pytest.raises(UserError):
        parse(values(poisons={"given": {"file": "given.safetensors"}}, grid=grid()["grid"]))
