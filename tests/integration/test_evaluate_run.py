"""The control's curve: a clean run's checkpoints on the poisoned bank of another run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cp_plugin.apps.evaluate_run import control_curve, evaluate, poison_of, sets_of
from cp_plugin.apps.hydra_app import compose
from cp_plugin.config.settings import UserError
from cp_plugin.engine.run import run
from tests.support.applications import Ran

KEEP = "+checkpoint.keep_prev=true"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]


@pytest.fixture
def trained(tmp_path, image_folder):
    images = image_folder()
    small = [
        "data=custom",
        f"data.train_path={images}",
        f"data.val_path={images}",
        "data.num_workers=0",
        "backbone.kwargs.channels=[8,8,8,8]",
        "optimizer.batch_size=6",
        f"checkpoint.dir={tmp_path}",
    ]

    def train(*overrides):
        return Path(run(compose("simclr", [*small, *overrides]))["folder"])

    return train


def test_the_controls_curve_is_the_clean_encoder_at_every_checkpoint(trained):
    clean = trained("+poison=none", "max_epochs=4", "checkpoint.frequency=2", KEEP)
    poison = poison_of(trained("+poison=random", "poison.eps=64/255", "max_epochs=1"))
    curve = control_curve(clean, sets_of(clean, poison))
    assert [row["step"] for row in curve] == [4, 8]
    for row, name in zip(curve, ("epoch=1.ckpt", "last.ckpt"), strict=True):
        _, poisoned = evaluate(clean / name, poison, probe="none")
        assert row["knn_control"] == poisoned["knn"]["accuracy"]


def test_a_run_that_kept_only_its_last_checkpoint_has_no_curve(trained):
    clean = trained("+poison=none", "max_epochs=2", "checkpoint.frequency=1")
    poison = poison_of(trained("+poison=random", "max_epochs=1"))
    assert control_curve(clean, sets_of(clean, poison)) == []


def test_every_probe_says_its_protocol(trained):
    clean = trained("+poison=none", "max_epochs=1")
    (row,) = evaluate(clean, probe="paper")
    assert row["linear"]["protocol"] == "cosine"
    assert row["linear_paper"]["protocol"] == "paper"
    assert row["linear_paper"]["epochs"] == 100
    assert "linear_paper" not in evaluate(clean)[0]
    with pytest.raises(UserError, match="probe must be one of cosine, paper, none; got 'theirs'"):
        evaluate(clean, probe="theirs")


def accuracy(rows):
    return [row["knn"]["accuracy"] for row in rows]


def test_another_folder_as_bank(trained, tmp_path, image_folder):
    """Of other classes, sizes and forms: each is measured rightly, or refused in a sentence."""
    run_folder = trained("+poison=random", "max_epochs=1")
    images = tmp_path / "images"
    own = evaluate(run_folder, probe="none")
    assert accuracy(evaluate(run_folder, probe="none", data=images)) == accuracy(own)
    # Larger pictures of the same classes are other images: they have no row.
    large = image_folder("large", size=100)
    (row,) = evaluate(run_folder, probe="none", data=large, test=images)
    assert row["bank"] == "clean"
    assert row["knn"]["accuracy"] > 60  # of three classes, the queries among them
    more = image_folder("more", classes=5)
    assert len(evaluate(run_folder, probe="none", data=more)) == 1
    fewer = image_folder("fewer", classes=2)
    with pytest.raises(UserError, match=r"own test images; give those of its classes with --test"):
        evaluate(run_folder, probe="none", data=fewer)
    rows = evaluate(run_folder, probe="none", data=fewer, test=fewer)  # a part of its own images
    assert [row["bank"] for row in rows] == ["clean", "poisoned"]
    flat = image_folder("flat", flat=True)
    for given in ({"data": flat}, {"test": flat}):
        with pytest.raises(UserError, match=r"--(data|test)=.*flat has images but no class subf"):
            evaluate(run_folder, probe="none", **given)
    with pytest.raises(UserError, match=r"--data=.*nowhere is not a folder"):
        evaluate(run_folder, probe="none", data=tmp_path / "nowhere")


def test_other_test_images_of_a_set_that_has_its_own(tmp_path, image_folder):
    small = ["backbone.kwargs.channels=[8,8,8,8]", "max_epochs=1", "data.num_workers=0"]
    settings = [*small, "data.dataset=photos", f"checkpoint.dir={tmp_path}", "+poison=none"]
    run_folder = Path(run(compose("simclr", settings))["folder"])
    images = image_folder(classes=3, per_class=4)
    (given,) = evaluate(run_folder, probe="none", test=images)
    (own,) = evaluate(run_folder, probe="none")
    assert given["knn"] != own["knn"]
    with pytest.raises(UserError, match=r"with --test DIR"):
        evaluate(run_folder, probe="none", data=images)


def test_a_runs_own_classifier_keeps_its_numbers(tmp_path, image_folder):
    images = image_folder()
    settings = [
        *("data=custom", f"data.train_path={images}", f"data.val_path={images}", "max_epochs=1"),
        *("data.num_workers=0", "backbone.kwargs.channels=[8,8,8,8]", "optimizer.batch_size=6"),
        *(f"checkpoint.dir={tmp_path}", "+poison=none"),
    ]
    run_folder = Path(run(compose("supervised", settings))["folder"])
    (whole,) = evaluate(run_folder, probe="none")
    shown = []
    for name in sorted(folder.name for folder in images.iterdir()):
        one = tmp_path / f"only {name}"
        one.mkdir()
        (one / name).symlink_to(images / name)
        (row,) = evaluate(run_folder, probe="none", data=one, test=one)
        shown.append(row["classifier"])
    assert sum(shown) / len(shown) == pytest.approx(whole["classifier"])


@pytest.mark.filterwarnings("ignore")
def test_a_test_folder_may_lack_a_class(
    image_folder: Callable[..., Path], call: Callable[..., Ran], tmp_path: Path
) -> None:
    """The classes after it have other numbers there; the accuracy is the same."""
    train = image_folder("train", classes=4, per_class=8)
    test = image_folder("test", classes=4, per_class=8)
    first = sorted(test.iterdir())[0]
    for file in first.iterdir():
        file.unlink()
    first.rmdir()
    ran = call(
        *("pretrain", "--config-name", "simclr", "data.dataset=custom", "+monitor=knn"),
        *(f"data.train_path={train}", f"data.val_path={test}", "data.num_workers=0"),
        *("max_epochs=1", "optimizer.batch_size=8", "backbone.kwargs.channels=[8,8,8,8]"),
        *("checkpoint.dir=runs", "monitor.k=1"),
    )
    assert ran.code == 0, ran.err
    (folder,) = [path.parent for path in (tmp_path / "runs").rglob("result.json")]
    (row,) = evaluate(folder, k=1)
    # The test images are training images too, so the nearest neighbour of each is itself.
    assert row["knn"]["accuracy"] == 100
    assert row["linear"]["last"] > 0
