"""The embedded methods against slow loops, closed forms and solo-learn's own parts."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightly.loss import NTXentLoss
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cp_plugin.config.settings import UserError
from cp_plugin.engine.base import Method
from cp_plugin.engine.methods import METHODS, build_method
from cp_plugin.engine.optimisation import build_optimizer
from cp_plugin.engine.pipeline import BLUR_SIGMAS, build_pipeline
from cp_plugin.engine.run import check
from cp_plugin.engine.settings import complete, device_count

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
TINY = [
    "backbone.kwargs={layers:[1,1,1,1],channels:[8,8,8,16],stem_type:deep,stem_width:4}",
    "+backbone.kwargs.zero_init_last=False",  # else some gradients are zero at the start
]
STOCK = [
    ("cifar", "simclr", 32),
    ("cifar", "byol", 32),
    ("cifar", "mocov2plus", 32),
    ("custom", "byol", 224),
    ("imagenet-100", "simclr", 224),
]
pytestmark = [
    # Lightning 2.6 asks torch >= 2.9 for a type that is on its way out.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Small data in memory: workers would only cost time.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def _config(method: str, *overrides: str, folder: Path = CONFIGS) -> DictConfig:
    with initialize_config_dir(str(folder), version_base="1.2"):
        return compose(method, [*overrides])


def _tiny(method: str, *overrides: str) -> Method:
    torch.manual_seed(0)
    return build_method(complete(_config(method, *TINY, *overrides)), 16)


def _heads_only(method: str, *overrides: str) -> Method:
    """A method whose images are its features: what is left is the loss."""
    module = _tiny(method, "+performance.disable_channel_last=True", *overrides)
    for name in ("backbone", "projection_head", "backbone_momentum", "projection_head_momentum"):
        if hasattr(module, name):
            setattr(module, name, nn.Identity())
    return module.double()


def _unit(rows: Tensor) -> np.ndarray:
    array = rows.detach().numpy()
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def _views(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return both[0].requires_grad_(), both[1].requires_grad_()


def _fit(module: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
    """Train on 64 images, batch 16."""
    views = TensorDataset(*_smooth_images(64, seed=1))

    def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
        return [torch.stack(view) for view in zip(*items, strict=True)], torch.zeros(len(items))

    loader = DataLoader(views, 16, shuffle=True, drop_last=True, collate_fn=collate)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **{"max_epochs": 2, **quiet, **kwargs},
    )
    trainer.fit(module, loader)
    return trainer


def _smooth_images(count: int, seed: int) -> list[Tensor]:
    """Two noisy views of smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(coarse, 16, mode="bicubic")
    return list(images + 0.3 * torch.randn(2, *images.shape, generator=generator))


# ---------------------------------------------------------------------------------------- losses


def test_simclr_loss_is_nt_xent() -> None:
    z0, z1 = _views(5, 7)
    module = _heads_only("simclr", "method_kwargs.temperature=0.3")
    rows = np.concatenate([_unit(z0), _unit(z1)])
    total = 0.0
    for i in range(10):
        similar = [math.exp(rows[i] @ rows[j] / 0.3) for j in range(10)]
        others = sum(value for j, value in enumerate(similar) if j != i)
        total -= math.log(similar[(i + 5) % 10] / others) / 10
    loss = module.training_step(((z0, z1), None, ["name"] * 5), 0)
    assert loss.item() == pytest.approx(total, rel=1e-12)


def test_byol_loss_is_the_squared_distance_both_ways() -> None:
    z0, z1 = _views(6, 4)
    module = _heads_only("byol")
    predict = torch.randn(4, 4, dtype=torch.float64)
    module.prediction_head = nn.Linear(4, 4, bias=False)
    module.prediction_head.weight = nn.Parameter(predict)
    expected = sum(
        float(np.square(_unit(p @ predict.T) - _unit(z)).sum(axis=1).mean())
        for p, z in ((z0, z1), (z1, z0))
    )
    loss = module.training_step(((z0, z1), None), 0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_moco_loss_and_its_first_in_first_out_queues() -> None:
    module = _heads_only(
        "mocov2plus", "method_kwargs.queue_size=8", "method_kwargs.proj_output_dim=3"
    )
    banks = [module.criterion.memory_bank.bank, module.criterion_swapped.memory_bank.bank]
    queues = [deque(bank.clone().numpy(), maxlen=8) for bank in banks]
    for step in range(4):
        z0, z1 = _views(4, 3, seed=step)
        rows = _unit(z0), _unit(z1)
        expected = 0.0
        for queue, queries, keys in zip(queues, rows, rows[::-1], strict=True):
            for query, key in zip(queries, keys, strict=True):
                positive = math.exp(query @ key / 0.2)
                negative = sum(math.exp(query @ old / 0.2) for old in queue)
                expected -= math.log(positive / (positive + negative)) / 8
            queue.extend(keys)
        loss = module.training_step(((z0, z1), None), 0)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        for bank, queue in zip(banks, queues, strict=True):
            kept = sorted(map(tuple, bank.numpy().tolist()))
            assert np.allclose(kept, sorted(map(tuple, queue)), atol=1e-12)


def test_simsiam_loss_is_the_mean_cosine_with_what_is_held() -> None:
    z0, z1 = _views(6, 4)
    module = _heads_only("simsiam")
    predict = torch.randn(4, 4, dtype=torch.float64)
    module.prediction_head = nn.Linear(4, 4, bias=False)
    module.prediction_head.weight = nn.Parameter(predict)
    pairs = ((z0, z1), (z1, z0))
    expected = [-(_unit(p @ predict.T) * _unit(z)).sum(axis=1).mean() for p, z in pairs]
    loss = module.training_step(((z0, z1), None), 0)
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-9)
    held = -nn.functional.cosine_similarity(z0 @ predict.T, z1.detach()).mean() / 2
    found, wanted = (torch.autograd.grad(value, z0)[0] for value in (loss, held))
    assert torch.allclose(found, wanted)


def test_barlow_twins_loss_is_the_papers() -> None:
    z0, z1 = _views(8, 5)
    module = _heads_only("barlow_twins", "method_kwargs.lamb=0.2", "method_kwargs.scale_loss=0.5")
    rows = [z.detach().numpy() for z in (z0, z1)]
    a, b = ((z - z.mean(0)) / z.std(0) for z in rows)
    expected = 0.0
    for i in range(5):
        for j in range(5):
            correlation = sum(a[n, i] * b[n, j] for n in range(8)) / 8
            expected += (1 - correlation) ** 2 if i == j else 0.2 * correlation**2
    loss = module.training_step(((z0, z1), None), 0)
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-3)  # Lightly's norm has an epsilon


def test_vicreg_loss_is_the_papers() -> None:
    z0, z1 = _views(8, 5)
    weights = ("sim_loss_weight=2", "var_loss_weight=3", "cov_loss_weight=4")
    module = _heads_only("vicreg", *(f"method_kwargs.{weight}" for weight in weights))
    a, b = (z.detach().numpy() for z in (z0, z1))
    expected = 2 * ((a - b) ** 2).mean()
    for z in (a, b):
        centred = z - z.mean(0)
        for i in range(5):
            deviation = math.sqrt((centred[:, i] ** 2).sum() / 7 + 1e-4)
            expected += 3 * max(0, 1 - deviation) / 5 / 2
            for j in range(5):
                if i != j:
                    covariance = (centred[:, i] * centred[:, j]).sum() / 7
                    expected += 4 * covariance**2 / 5
    loss = module.training_step(((z0, z1), None), 0)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_dino_loss_is_the_cross_entropy_with_the_other_view_and_its_centre_follows() -> None:
    module = _heads_only("dino", "method_kwargs.num_prototypes=5")
    centre = np.zeros(5)
    for step in range(3):
        z0, z1 = _views(6, 5, seed=step)
        rows = [z.detach().numpy() for z in (z0, z1)]
        expected = 0.0
        for teacher, student in ((rows[0], rows[1]), (rows[1], rows[0])):
            for t, s in zip(teacher, student, strict=True):
                target = np.exp((t - centre) / 0.04 - ((t - centre) / 0.04).max())
                logs = s / 0.1 - np.log(np.exp(s / 0.1).sum())
                expected -= float(target / target.sum() @ logs) / 12
        loss = module.training_step(((z0, z1), None), 0)
        assert loss.item() == pytest.approx(expected, rel=1e-5)  # Lightly's temperature is float32
        centre = 0.9 * centre + 0.1 * np.concatenate(rows).mean(0)
        assert np.allclose(module.criterion.center.flatten().numpy(), centre, atol=1e-6)


def test_dinos_last_layer_stands_still_in_the_first_epoch() -> None:
    for frozen in (1, 0):
        module = _tiny("dino", f"method_kwargs.freeze_last_layer={frozen}")
        before = module.projection_head.last_layer.weight_v.detach().clone()
        first = module.projection_head.layers[0].weight.detach().clone()
        _fit(module, max_epochs=1)
        assert torch.equal(module.projection_head.last_layer.weight_v, before) == bool(frozen)
        assert not torch.equal(module.projection_head.layers[0].weight, first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_reaches_all_but_the_momentum_branch(method: str, dtype: torch.dtype) -> None:
    module = _tiny(method, "+data.num_classes=3").to(dtype)
    views = [torch.randn(8, 3, 16, 16, dtype=dtype) for _ in range(2)]
    loss = module.training_step((views, torch.arange(8) % 3), 0)
    assert loss.dtype == dtype
    loss.backward()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and "_momentum" not in name:
            assert name.endswith("last_layer.weight_g")  # DINO's, which stays 1
            continue
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached != ("_momentum" in name), name


# -------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("method", "epochs", "overrides"),
    [
        ("simclr", 10, ["optimizer.lr=0.5"]),
        ("byol", 10, ["optimizer.lr=0.5", "momentum.base_tau=0.5"]),
        (
            "mocov2plus",
            20,
            ["optimizer.lr=0.1", "momentum.base_tau=0.97", "method_kwargs.queue_size=64"],
        ),
        ("simsiam", 10, ["optimizer.lr=0.5"]),
        ("barlow_twins", 10, ["optimizer.lr=0.3"]),
        ("vicreg", 10, ["optimizer.lr=0.05"]),
        ("dino", 20, ["optimizer.lr=0.5", "momentum.base_tau=0.9"]),
    ],
)
def test_training_tells_unseen_images_apart(method: str, epochs: int, overrides: list[str]) -> None:
    """By NT-Xent, which is log(127) = 4.84 where all features are one; at the start it is near."""
    unseen = _smooth_images(64, seed=2)
    module = _tiny(method, *overrides)

    @torch.no_grad()
    def distance() -> float:
        return float(NTXentLoss(0.1)(*[module.train()(view) for view in unseen]))

    before = distance()
    _fit(module, max_epochs=epochs)
    assert distance() < before - 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_momentum_branch_is_solo_learns_moving_average(accumulate: int) -> None:
    module = _tiny("byol", "momentum.base_tau=0.5", "momentum.final_tau=0.9")
    expected = [p.detach().clone() for p in module.backbone.parameters()]
    total, seen = 8 // accumulate, []

    class Recorder(Callback):
        """Runs before the module's own hook of the same name."""

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == len(seen):
                return
            tau = 0.9 - 0.4 * (math.cos(math.pi * len(seen) / total) + 1) / 2
            seen.append(tau)
            for mean, online in zip(expected, module.backbone.parameters(), strict=True):
                mean.mul_(tau).add_(online.detach(), alpha=1 - tau)

    _fit(module, Recorder(), accumulate_grad_batches=accumulate)
    assert len(seen) == total
    for mean, parameter in zip(expected, module.backbone_momentum.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), mean)
    for mean, parameter in zip(expected, module.backbone.parameters(), strict=True):
        assert not torch.equal(parameter.detach(), mean)


@pytest.mark.parametrize("end", [{"max_epochs": 3}, {"max_epochs": 100, "max_steps": 9}])
def test_learning_rate_ends_with_training(end: dict[str, int]) -> None:
    module = _tiny(
        "simclr",
        "optimizer.batch_size=256",
        "scheduler.warmup_epochs=1",
        "+scheduler.min_lr=0.125",
        "+scheduler.warmup_start_lr=0.1",
    )
    rates: list[float] = []

    class Recorder(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = _fit(module, Recorder(), **end)
    assert trainer.estimated_stepping_batches == len(rates) == end.get("max_steps", 12)
    assert rates[:4] == pytest.approx([0.2, 0.3, 0.4, 0.5])  # an epoch of four steps
    assert rates[4] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.125)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_warmup_longer_than_training_keeps_its_slope() -> None:
    module = _tiny("simclr", "optimizer.batch_size=256", "scheduler.warmup_epochs=10")
    trainer = _fit(module, max_epochs=1)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 5 / 40, rel=1e-3)


def test_step_schedule_and_none() -> None:
    decayed = _tiny("simclr", "scheduler.name=step", "+scheduler.lr_decay_steps=[1]")
    assert _fit(decayed).optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)
    constant = _tiny("simclr", "scheduler.name=none")
    assert _fit(constant).optimizers[0].param_groups[0]["lr"] == pytest.approx(0.25)


def test_bf16_mixed_training() -> None:
    trainer = _fit(_tiny("mocov2plus"), precision="bf16-mixed", max_epochs=1)
    assert trainer.global_step == 4
    assert trainer.callback_metrics["train_loss"].isfinite()


def test_checkpoint_brings_queue_and_configuration_back(tmp_path: Path) -> None:
    module = _tiny("mocov2plus", "method_kwargs.queue_size=32")
    trainer = _fit(module, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = METHODS["mocov2plus"].load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.cfg == module.cfg
    assert again.state_dict().keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert "criterion.memory_bank.bank" in module.state_dict()


def test_training_step_runs_without_a_trainer_and_logs_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tiny("byol").training_step(([torch.randn(4, 3, 16, 16)] * 2, None), 0)


# --------------------------------------------------------------------------------- configuration


def test_learning_rate_is_scaled_once_and_the_input_left_alone() -> None:
    raw = _config("simclr", "optimizer.batch_size=64", "devices=[0,1,2]", "optimizer.lr=0.4")
    before = OmegaConf.to_container(raw)
    done = complete(raw)
    assert done.optimizer.lr == pytest.approx(0.4 * 64 * 3 / 256)
    assert OmegaConf.to_container(raw) == before
    assert complete(done) == done


def test_accumulation_scales_all_rates() -> None:
    done = complete(_config("simclr", "+accumulate_grad_batches=3", "+scheduler.min_lr=0.01"))
    assert done.optimizer.lr == pytest.approx(0.5 * 128 / 256 * 3)
    assert done.scheduler.min_lr == pytest.approx(0.03)
    assert done.scheduler.warmup_start_lr == pytest.approx(9e-5)


@pytest.mark.parametrize(
    ("devices", "accelerator", "count"),
    [
        (3, "cpu", 3),
        ("2", "cpu", 2),
        ("0,1", "gpu", 2),
        ("1,", "gpu", 1),
        ([0, 4], "gpu", 2),
        ("auto", "cpu", 1),
        (-1, "cpu", 1),
    ],
)
def test_device_count(devices: Any, accelerator: str, count: int) -> None:
    assert device_count(devices, accelerator) == count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("augmentations", ["cifar_paper", "symmetric", "asymmetric"])
def test_shipped_configurations(method: str, augmentations: str) -> None:
    cfg = complete(_config(method, f"augmentations={augmentations}"))
    assert cfg.name == f"{method}-photos"
    views = build_pipeline(cfg)(Image.new("RGB", (40, 36)))
    assert [view.shape for view in views] == [(3, 32, 32)] * 2


def test_data_by_group_and_by_plain_overrides() -> None:
    plain = _config("byol", "data.dataset=custom", "data.train_path=images", "data.no_labels=True")
    grouped = _config("byol", "data=custom", "data.train_path=images")
    for cfg in (plain, grouped):
        assert (cfg.data.dataset, cfg.data.train_path) == ("custom", "images")
        complete(cfg)
    assert _config("byol", "data=cifar10").data.dataset == "cifar10"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=moco"], r"method=moco is unknown .* did you mean"),
        (["~method"], "has no method; add method="),
        (["optimizer.name=sdg"], "did you mean sgd"),
        (["scheduler.name=reduce"], "known: warmup_cosine, step, none"),
        (["scheduler.name=step"], "needs scheduler.lr_decay_steps"),
        (["+scheduler.interval=day"], "known: step, epoch"),
        (["~augmentations"], "has no augmentations"),
        (["~method_kwargs.temperature"], "has no method_kwargs.temperature"),
        (["method_kwargs.temperature=0"], "temperature must be a positive number, got 0"),
        (["optimizer.batch_size=0"], "batch_size must be a whole number"),
        (["max_epochs=many"], "max_epochs must be a whole number"),
        (["devices=some"], "devices must be a number"),
        (["augmentations.0.num_crops=3"], r"needs two views of one size, .* 3 of \[32\]"),
        (["~augmentations.0.crop_size"], "needs num_crops and crop_size"),
    ],
)
def test_bad_configurations(overrides: list[str], message: str) -> None:
    cfg = _config("simclr")
    OmegaConf.set_struct(cfg, False)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if override.startswith("~"):
            parent, _, leaf = key.rpartition(".")
            del (OmegaConf.select(cfg, parent) if parent else cfg)[leaf]
        else:
            OmegaConf.update(cfg, key, OmegaConf.from_dotlist([f"v={value}"]).v)
    with pytest.raises(UserError, match=message):
        complete(cfg)


def test_taus_out_of_order() -> None:
    with pytest.raises(UserError, match=r"base_tau <= momentum.final_tau.* got 0.99 and 0.5"):
        complete(_config("byol", "momentum.final_tau=0.5"))


def test_unknown_optimizer_argument() -> None:
    with pytest.raises(UserError, match=r"optimizer sgd cannot be built .*momentun"):
        build_optimizer(
            [nn.Parameter(torch.ones(1))],
            complete(_config("simclr", "+optimizer.kwargs.momentun=1")),
        )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rotation", {"prob": 0.5}, r"augmentations.rotation is not known; known are rrc, "),
        ("grayscale", {"p": 0.5}, r"augmentations.grayscale.p is not known; known are prob"),
        ("color_jitter", {"prob": 1.0, "brightness": 1}, "color_jitter needs 'contrast'"),
        ("color_jitter.hue", 3.0, "color_jitter has a bad value"),
        ("horizontal_flip.prob", 1.5, r"prob must be in \[0, 1\], got 1.5"),
        ("rrc.crop_min_scale", 0, "rrc has a bad value: expected 0 < crop_min_scale"),
    ],
)
def test_bad_augmentations(key: str, value: Any, message: str) -> None:
    cfg = complete(_config("simclr"))
    OmegaConf.update(cfg.augmentations[0], key, value, merge=False)
    with pytest.raises(UserError, match=message):
        build_pipeline(cfg)


# ------------------------------------------------------------------------------------ solo-learn


@pytest.fixture
def solo_file(solo_learn: Path) -> Callable[[str], ModuleType]:
    """Loads one file of solo-learn without the package around it."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, solo_learn / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize(("folder", "method", "size"), STOCK)
def test_stock_yaml_runs_as_it_stands(
    solo_learn: Path, folder: str, method: str, size: int
) -> None:
    raw = _config(method, folder=solo_learn / "scripts" / "pretrain" / folder)
    cfg = complete(raw)
    scale = raw.optimizer.batch_size * len(raw.devices) / 256
    assert cfg.optimizer.lr == pytest.approx(raw.optimizer.lr * scale)
    assert cfg.augmentations[0].crop_size == size
    cfg.backbone.kwargs = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}
    module = build_method(cfg, 32)
    views = build_pipeline(cfg)(Image.new("RGB", (48, 48)))
    assert [tuple(view.shape) for view in views] == [(3, size, size)] * 2
    layers = [m for m in module.projection_head.modules() if isinstance(m, nn.Linear)]
    assert [layer.out_features for layer in layers] == [
        raw.method_kwargs.proj_hidden_dim,
        raw.method_kwargs.proj_output_dim,
    ]
    optimizer = build_optimizer(module.parameters(), cfg)
    assert type(optimizer).__name__.lower() == raw.optimizer.name


@pytest.mark.parametrize(("folder", "method", "size"), STOCK)
def test_pipelines_give_solo_learns_pixels(
    solo_learn: Path,
    solo_file: Callable[[str], ModuleType],
    folder: str,
    method: str,
    size: int,
) -> None:
    """Without blur, whose sigma both draw from generators of their own, bit for bit."""
    cfg = complete(_config(method, folder=solo_learn / "scripts" / "pretrain" / folder))
    theirs = solo_file("solo/data/pretrain_dataloader.py")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for node in cfg.augmentations:
        node.gaussian_blur.prob = 0.0
        node.equalization.prob = 0.3
        node.solarization.prob = 0.3
    ours = build_pipeline(cfg).transforms
    reference = [
        theirs.build_transform_pipeline(cfg.data.dataset, node)
        for node in cfg.augmentations
        for _ in range(node.num_crops)
    ]
    assert len(ours) == len(reference)
    for mine, stock in zip(ours, reference, strict=True):
        for seed in range(12):
            torch.manual_seed(seed)
            view = mine(image)
            torch.manual_seed(seed)
            assert torch.equal(view, stock(image)), seed


def test_blur_is_solo_learns(solo_file: Callable[[str], ModuleType]) -> None:
    theirs = solo_file("solo/data/pretrain_dataloader.py").GaussianBlur()
    cfg = complete(_config("simclr"))
    cfg.augmentations[0].gaussian_blur.prob = 1.0
    (blur,) = [
        step for step in build_pipeline(cfg).transforms[0].transforms if "Blur" in repr(step)
    ]
    assert (blur.prob, tuple(blur.sigmas)) == (1.0, tuple(theirs.sigma))
    assert tuple(theirs.sigma) == BLUR_SIGMAS
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for sigma in (0.1, 0.7, 2.0):
        blur.sigmas = theirs.sigma = (sigma, sigma)
        assert np.array_equal(np.array(blur(image)), np.array(theirs(image)))


def test_statistics_are_solo_learns(solo_file: Callable[[str], ModuleType]) -> None:
    theirs = solo_file("solo/data/pretrain_dataloader.py").build_transform_pipeline
    for dataset in ("cifar10", "cifar100", "stl10", "imagenet", "imagenet100", "custom", "photos"):
        cfg = complete(_config("simclr"))
        cfg.data.dataset = dataset
        cfg.augmentations[0].update({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
        mine = build_pipeline(cfg).transforms[0].transforms[-1]
        stock = theirs(dataset, cfg.augmentations[0]).transforms[-1]
        assert (tuple(mine.mean), tuple(mine.std)) == (tuple(stock.mean), tuple(stock.std))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("exclude", [True, False])
def test_lars_makes_solo_learns_steps(
    solo_file: Callable[[str], ModuleType], clip: bool, exclude: bool
) -> None:
    reference = solo_file("solo/utils/lars.py").LARS
    cfg = complete(
        _config(
            "byol",
            "optimizer.name=lars",
            "optimizer.weight_decay=1e-2",
            f"+optimizer.kwargs={{clip_lr:{clip},eta:0.02,exclude_bias_n_norm:{exclude}}}",
        )
    )

    def run(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 2))
        nn.init.uniform_(net[0].bias, 0.1, 0.2)
        nn.init.uniform_(net[1].bias, 0.1, 0.2)
        optimizer = make(list(net.parameters()))
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.randn(16, 6)).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in net.parameters()]

    mine = run(lambda parameters: build_optimizer(parameters, cfg))
    settings = {"lr": cfg.optimizer.lr, "weight_decay": 1e-2, "momentum": 0.9, "eta": 0.02}
    stock = run(
        lambda parameters: reference(
            parameters, **settings, clip_lr=clip, exclude_bias_n_norm=exclude
        )
    )
    for ours, theirs in zip(mine, stock, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("times", "precision"), [(1.3, "bf16-mixed"), (1.1, "32"), (0.1, "32")])
def test_half_precision_of_a_gpu_becomes_what_the_processor_is_measured_fast_at(
    times: float, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CP_PLUGIN_PROCESSOR_PRECISION", "")
    monkeypatch.setattr(
        "cp_plugin.engine.precision._times_as_fast", lambda: measured.append(times) or times
    )
    for _ in range(3):
        _, settings = check(_config("simclr", "accelerator=gpu", "precision=16-mixed"))
        assert (settings.accelerator, str(settings.precision)) == ("cpu", precision)
    assert measured == [times]  # once a run, and for the processes that it starts


def test_what_is_measured_is_what_takes_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from cp_plugin.engine import precision

    spent = {"32": 2.0, "bf16-mixed": 1.0}
    clock = [0.0]
    monkeypatch.setattr(precision.time, "process_time", lambda: clock[0])

    def work(net: nn.Module, images: Tensor, name: str) -> None:
        clock[0] += spent[name]

    monkeypatch.setattr(precision, "_pass", work)
    assert precision._times_as_fast() == 2.0
    spent["32"] = 0.1
    assert precision._times_as_fast() == pytest.approx(0.1)


def test_measuring_draws_no_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CP_PLUGIN_PROCESSOR_PRECISION", "")
    state = torch.get_rng_state()
    _, settings = check(_config("simclr", "accelerator=cpu", "precision=16-mixed"))
    assert str(settings.precision) in ("32", "bf16-mixed")
    assert torch.equal(torch.get_rng_state(), state)
