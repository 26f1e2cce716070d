"""The command line: the whole job on small folders, and mistakes answered by one sentence."""

import json

import pytest
import torch
from PIL import Image

from cp_plugin import Poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.data import RawDataset, load

SMALL = [
    "backbone.kwargs.channels=[8,8,8,8]",
    "max_epochs=1",
    "optimizer.batch_size=6",
    "data.num_workers=0",
    "precision=32",
]
CRAFT = ["poison.rounds=1", "poison.model_steps=2", "poison.noise_steps=1", "poison.pgd_steps=1"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]


@pytest.fixture
def pretrain(call, image_folder):
    """`cp-plugin pretrain` on a small folder of images, with overrides."""
    folder = image_folder()

    def run(*overrides, name="simclr", data=folder):
        source = ["data.dataset=custom", f"data.train_path={data}"]
        return call("pretrain", "--config-name", name, *source, *SMALL, *overrides)

    return run


def only(folder, pattern):
    (found,) = folder.rglob(pattern)
    return found


@pytest.mark.parametrize("method", ["simclr", "mocov2plus", "byol"])
def test_craft_inject_export_and_evaluate(method, pretrain, call, tmp_path, image_folder):
    code, _, error = pretrain("+poison=cp", *CRAFT, name=method)
    assert code == 0, error
    poison = only(tmp_path, "poison.safetensors")
    for file in ("config.yaml", "result.json", "last.ckpt", "metrics.csv"):
        assert only(poison.parent, file)
    assert not (tmp_path / "outputs").exists()

    code, _, error = pretrain("+poison=inject", f"poison.path={poison}", name=method)
    assert code == 0, error
    victim = next(path for path in tmp_path.rglob("result.json") if "inject" in str(path)).parent
    assert json.loads((victim / "result.json").read_text())["surrogate_steps"] == 2

    assert call("export", poison, "exported")[0] == 0
    exported, clean = (
        load("custom", tmp_path / "exported")[0],
        load("custom", tmp_path / "images")[0],
    )
    assert [name.split("exported")[-1] for name, _ in exported.samples] == [
        name.split("images")[-1] for name, _ in clean.samples
    ]
    loaded = Poison.load(poison)
    assert loaded.info["host"] == "cp-plugin"
    for written, original in zip(RawDataset(exported, 32), RawDataset(clean, 32), strict=True):
        injected = loaded.apply(original.image[None], loaded.rows([original.key]))[0]
        assert torch.equal(written.image, injected)
        off = written.image.short() - original.image.short()
        assert 0 < off.abs().max() <= 8

    evaluate = ["evaluate", victim / "last.ckpt", "--json", "--k", 3]
    injected = call(*evaluate, "--test", tmp_path / "images")
    direct = call(
        *evaluate, "--test", tmp_path / "images", "--data", "exported", "--poison", poison
    )
    rows = {row["bank"]: row for row in json.loads(injected[1])}
    (on_exported,) = json.loads(direct[1])  # these carry delta; the poison has no row for them
    assert rows["poisoned"]["knn"] == on_exported["knn"]
    assert "no poisoned bank" in direct[2]
    assert rows["clean"]["knn"]["k"] == 3


def test_unlearnable_clusters_need_no_labels(pretrain, tmp_path):
    few = ["poison.clusters=2", "poison.epochs=2", "data.no_labels=True"]
    code, _, error = pretrain("+poison=unlearnable_clusters", *few)
    assert code == 0, error
    poison = Poison.load(only(tmp_path, "poison.safetensors"))
    assert poison.classes == ("cluster 0", "cluster 1")
    assert len(poison.owned_keys) == 12
    assert json.loads(poison.info["schedule"])["noise_steps_done"] == 4  # 2 passes of 2 batches
    assert "placement.centres" in poison.attached
    path = only(tmp_path, "poison.safetensors")
    code, _, error = pretrain("+poison=inject", f"poison.path={path}", "data.no_labels=True")
    assert code == 0, error


def test_inspect_shows_and_draws_a_poison(call, tmp_path):
    delta = Perturbation.uniform(3, (3, 16, 16), 8 / 255)
    Poison(delta, "class", classes=("a", "b", "c")).save(tmp_path / "p.safetensors")
    code, out, _ = call("inspect", "p.safetensors")
    assert code == 0
    assert "eps 8.00/255" in out
    assert "share of energy without colour" in out
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] > 100


def test_inspect_says_how_well_delta_alone_tells_classes(call, tmp_path, image_folder, photos):
    image_folder()
    delta = Perturbation.uniform(3, (3, 16, 16), 8 / 255)
    Poison(delta, "class", classes=tuple(photos.classes[:3])).save(tmp_path / "p.safetensors")
    alone = call("inspect", "p.safetensors", "--separability")
    assert alone[0] == 2
    assert "give the folder of clean images with --data DIR" in alone[2]
    code, out, error = call(
        "inspect", "p.safetensors", "--separability", "--data", "images", "--json"
    )
    assert code == 0, error
    facts = json.loads(out)
    assert facts["classes told from delta alone, held out"] == "100.0 %"
    assert len(facts["mean power by cycles an image"]) == 9
    assert facts["share of energy common to all rows"] == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_authors_poisons_come_in(call, tmp_path, image_folder, wrapped):
    from argparse import Namespace

    image_folder()
    delta = torch.rand(3, 3, 32, 32) * 3 - 1.5
    content = {"opt": Namespace(lr=1), "model": {"delta": delta}, "epoch": 9} if wrapped else delta
    torch.save(content, tmp_path / "authors.pth")
    given = ["--dataset", "custom", "--data", "images"]
    code, _, error = call("import", "authors.pth", "p.safetensors", *given)
    assert code == 0, error
    poison = Poison.load(tmp_path / "p.safetensors")
    assert poison.granularity == "class"
    expected = delta.clamp(-1, 1) * (8 / 255)
    assert torch.allclose(poison.perturbation.gather(torch.arange(3)), expected)


def test_a_sample_wise_poison_of_the_authors_gets_the_images_keys(call, tmp_path, image_folder):
    image_folder()
    torch.save(torch.rand(12, 3, 32, 32) * 2 - 1, tmp_path / "authors.pth")
    assert (
        call("import", "authors.pth", "p.safetensors", "--dataset", "custom", "--data", "images")[0]
        == 0
    )
    poison = Poison.load(tmp_path / "p.safetensors")
    raw = RawDataset(load("custom", tmp_path / "images")[0], 32)
    assert poison.rows([item.key for item in raw]).tolist() == list(range(12))


def test_code_in_a_pth_file_is_not_run(call, tmp_path, image_folder):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    image_folder()
    torch.save({"model": Harmful()}, tmp_path / "authors.pth")
    code, _, error = call("import", "authors.pth", "p.safetensors", "--data", "images")
    assert code == 2
    assert "cannot be read as plain tensors" in error
    assert not (tmp_path / "harm").exists()


def refused(result, *texts):
    """Exit code 2, one sentence on standard error, no traceback."""
    code, _, error = result
    assert code == 2, error
    assert "Traceback" not in error
    sentence = [line for line in error.splitlines() if line.startswith("cp-plugin: ")]
    assert len(sentence) == 1, error
    for text in texts:
        assert text in sentence[0]


def test_an_unknown_transform(pretrain):
    refused(pretrain("+poison=cp", "+augmentations.0.rotation.prob=1"), "rotation")


def test_a_class_poison_on_unlabelled_data(pretrain, image_folder):
    flat = image_folder(name="flat", flat=True)
    result = pretrain("+poison=cp_class", "data.no_labels=True", *CRAFT, data=flat)
    refused(result, "needs labelled images")


def test_a_poison_for_another_data_set(pretrain, tmp_path):
    other = Poison(Perturbation.zeros(1, (3, 32, 32), 8 / 255), "sample", keys=torch.tensor([5]))
    other.save(tmp_path / "other.safetensors")
    result = pretrain("+poison=inject", "poison.path=other.safetensors")
    refused(result, "no row for 12 of 12 images looked up", "astronaut_000.png")


def test_a_truncated_poison(pretrain, tmp_path):
    path = Poison(
        Perturbation.zeros(1, (3, 32, 32), 8 / 255), "sample", keys=torch.tensor([5])
    ).save(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    refused(pretrain("+poison=inject", "poison.path=cut.safetensors"), "damaged or truncated")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("poison.eps=8", "poison.eps must lie in [1/255, 1]"),
        ("poison.epz=0.1", "epz"),
        ("+poison.epz=0.1", "did you mean poison.eps"),
        ("backbone.name=timm/resnet81", "resnet18"),
        ("data.train_path=absent", "absent"),
        ("method=simclear", "did you mean simclr"),
    ],
)
def test_wrong_settings(pretrain, override, text):
    refused(pretrain("+poison=cp", *CRAFT, override), text)


def test_a_configuration_that_hydra_cannot_find(call, tmp_path):
    refused(call("pretrain", "--config-name", "simclear"), "simclear")
    refused(call("pretrain", "--config-path", "absent", "--config-name", "x"), "absent")
    refused(call("pretrain", "--config-name", "simclr", "+poison=cpp"), "cpp")


def test_a_relative_config_path_is_taken_from_the_working_directory(call, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text("method: simclr\n")
    refused(call("pretrain", "--config-path", "mine", "--config-name", "own"), "backbone.name")


def test_an_unreadable_image_is_named(pretrain, tmp_path):
    broken = tmp_path / "images" / "astronaut" / "astronaut_002.png"
    broken.write_bytes(b"not an image")
    refused(pretrain("+poison=cp", *CRAFT, "optimizer.batch_size=12"), "astronaut_002.png")


def test_an_unreadable_image_is_named_by_a_worker_too(pretrain, tmp_path):
    broken = tmp_path / "images" / "coffee" / "coffee_002.png"
    if not broken.exists():
        broken = next((tmp_path / "images").rglob("*_002.png"))
    broken.write_bytes(b"not an image")
    result = pretrain("+poison=cp", *CRAFT, "optimizer.batch_size=12", "data.num_workers=1")
    refused(result, broken.name)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["evaluate", "absent.ckpt"], "no checkpoint at absent.ckpt"),
        (["inspect", "absent.safetensors"], "no poison file at absent.safetensors"),
        (["export", "absent.safetensors", "out"], "no poison file"),
        (["import", "absent.pth", "out"], "no file at absent.pth"),
        (["import", "absent.pth", "out", "--eps", "many"], "--eps must be a number"),
    ],
)
def test_missing_files(call, arguments, text):
    refused(call(*arguments), text)


def test_demo_refuses_a_folder_with_files(call, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(call("demo", "--out", "full"), "full is not empty")
