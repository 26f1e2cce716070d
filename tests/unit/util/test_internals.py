"""Each private interface of another package does what it is used for; a failure names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.transforms import v2

from cp_plugin.util import internals


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_the_stack_of_function_modes() -> None:
    """torch._C: _push_on_torch_function_stack, _pop_…, _len_torch_function_stack

    _pop_torch_function_stack
    """
    mode = Seen()
    internals.push_function_mode(mode)
    torch.zeros(1).abs()
    assert internals.pushed_function_modes() == 1
    assert internals.pop_function_mode() is mode
    torch.zeros(1).sin()
    assert internals.pushed_function_modes() == 0
    assert mode.names == ["zeros", "abs"]


def test_torch_functions_switched_off() -> None:
    """torch._C.DisableTorchFunction"""
    with Seen() as mode:
        with internals.without_torch_functions():
            torch.zeros(1).abs()
        torch.ones(1)
    assert mode.names == ["ones"]


def test_copies_in_one_launch() -> None:
    """torch._foreach_copy_"""
    targets = [torch.zeros(2), torch.zeros(3)]
    internals.copy_all(targets, [torch.ones(2), torch.full((3,), 2.0)])
    assert [target.tolist() for target in targets] == [[1, 1], [2, 2, 2]]


def test_the_version_of_a_tensor() -> None:
    """Tensor._version"""
    tensor = torch.zeros(2)
    before = internals.version(tensor)
    tensor[:1].add_(1)
    assert internals.version(tensor) > before


def test_views_of_tensors() -> None:
    """Tensor._is_view"""
    tensor = torch.zeros(2, 2)
    assert internals.is_view(tensor[0])
    assert not internals.is_view(tensor)


def test_what_a_module_has_registered() -> None:
    """Module._parameters, Module._buffers, Module._modules"""
    module = nn.Sequential(nn.BatchNorm1d(2))
    parameters, buffers, _ = internals.registered(module[0])
    parameters["weight"] = nn.Parameter(torch.full((2,), 5.0))
    buffers["running_mean"] = torch.full((2,), 6.0)
    internals.registered(module)[2]["1"] = nn.ReLU()
    assert module.state_dict()["0.weight"].tolist() == [5, 5]
    assert module.state_dict()["0.running_mean"].tolist() == [6, 6]
    assert len(module) == 2


def test_a_table_of_modules_of_a_copy() -> None:
    """Module._modules"""
    module = nn.Sequential(nn.ReLU())
    copied = object.__new__(nn.Sequential)
    vars(copied).update(vars(module))
    internals.own_modules(copied, module)["0"] = nn.Tanh()
    assert isinstance(copied[0], nn.Tanh)
    assert isinstance(module[0], nn.ReLU)


def test_compiled_modules() -> None:
    """Module._compiled_call_impl, _torchdynamo_orig_callable, OptimizedModule._orig_mod"""
    plain, inside, whole = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    inside.compile(backend="eager")
    outer = torch.compile(whole, backend="eager")
    assert not internals.is_compiled(plain)
    assert internals.compiled_call(plain) is None
    assert internals.is_compiled(inside)
    vars(inside)[internals.COMPILED_CALL] = lambda x: x + 1
    assert inside(torch.zeros(2)).tolist() == [1, 1]
    assert internals.is_compiled(outer)
    assert internals.compiled_module(outer) is whole
    assert internals.compiled_module(plain) is plain


def test_trees() -> None:
    """torch.utils._pytree.tree_map"""
    assert internals.tree_map(lambda x: x + 1, {"a": [1, (2,)]}) == {"a": [2, (3,)]}


def test_an_epoch_that_is_over_is_not_interrupted() -> None:
    """_Loop.restarting, FitLoop.is_resuming: an epoch that was finished, with `max_steps`"""
    trainer = pl.Trainer(accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False)
    assert not internals.iterates_anew(trainer)  # the first epoch
    trainer.fit_loop.restarting = True
    assert trainer.fit_loop.restarting
    internals.finish_epoch(trainer)
    assert not trainer.fit_loop.restarting
    assert not trainer.fit_loop.epoch_loop.restarting
    trainer.fit_loop.epoch_progress.current.ready = 1
    trainer.fit_loop.restarting = True
    internals.finish_epoch(trainer)
    assert trainer.fit_loop.restarting  # in the midst of an epoch


def test_every_batch_normalisation_is_one() -> None:
    """torch.nn.modules.batchnorm._BatchNorm, _NormBase"""
    assert isinstance(nn.InstanceNorm1d(1), internals.NormBase)
    assert not isinstance(nn.InstanceNorm1d(1), internals.BatchNormBase)
    for layer in (nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.SyncBatchNorm(1)):
        assert isinstance(layer, internals.BatchNormBase)
        assert isinstance(layer, internals.NormBase)


def test_iterators_of_a_loader() -> None:
    """DataLoader._iterator, torch.utils.data.dataloader._BaseDataLoaderIter"""
    loader = DataLoader([0, 1], num_workers=1, persistent_workers=True)
    first = iter(loader)
    assert isinstance(first, internals.LoaderIterator)
    assert iter(loader) is first
    internals.forget_iterators(loader)
    assert iter(loader) is not first
    internals.forget_iterators(loader)


class Module(pl.LightningModule):
    def training_step(self, batch: Any) -> Any:
        return self.weight.square().sum()

    def configure_optimizers(self) -> Any:
        self.weight = nn.Parameter(torch.ones(1))
        return torch.optim.SGD([self.weight], lr=0.1)


class Note(pl.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.trainer = internals.trainer_of(pl_module)
        made = self.made = []
        loader = trainer.train_dataloader
        vars(loader)["dataset"] = [torch.full((1,), 7.0)]
        internals.remake_fetcher(trainer)
        vars(loader)["dataset"] = [torch.full((1,), 8.0)]
        made.append(loader)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.batch = batch


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_lightnings_iterator_and_trainer(tmp_path: Any) -> None:
    """FitLoop._data_fetcher, FitLoop._data_source, LightningModule._trainer"""
    note, module = Note(), Module()
    assert internals.trainer_of(module) is None
    assert internals.trainer_of(nn.Linear(1, 1)) is None
    trainer = pl.Trainer(
        **{"max_epochs": 1, "callbacks": [note], "logger": False, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
        default_root_dir=tmp_path,
    )
    loader = DataLoader([torch.zeros(1)])
    trainer.fit(module, loader)
    assert internals.training_source(trainer).dataloader() is loader
    assert note.trainer is trainer
    assert note.batch.tolist() == [[7.0]]


def test_a_job_of_hydra() -> None:
    """JobReturn._return_value, hydra._internal.callbacks.Callbacks"""
    from hydra.core.utils import JobReturn, JobStatus

    job = JobReturn()
    job.status, job.return_value = JobStatus.FAILED, ValueError("no")
    assert isinstance(internals.job_result(job), ValueError)
    assert callable(internals.hydra_callbacks().on_multirun_start)


def test_the_backbones_of_solo_learn(solo_learn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BaseMethod._BACKBONES"""
    monkeypatch.syspath_prepend(solo_learn)
    base = pytest.importorskip("solo.methods.base").BaseMethod
    assert "resnet18" in internals.backbones(base)


def test_who_starts_the_processes_of_a_run() -> None:
    """lightning: _SubprocessScriptLauncher.procs, .cluster_environment"""
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "barebones": True}
    several = pl.Trainer(devices=2, strategy="ddp", **settings)
    assert internals.launched_here(several)
    assert internals.launched(several) == []
    assert not internals.launched_here(pl.Trainer(devices=2, strategy="ddp_spawn", **settings))
    assert not internals.launched_here(pl.Trainer(devices=1, **settings))


@pytest.mark.parametrize("library", [v1, v2], ids=["v1", "v2"])
def test_what_policies_draw_from(library: Any) -> None:
    """_policies, _augmentation_space, _AUGMENTATION_SPACE and _PARTIAL_AUGMENTATION_SPACE"""
    for first, second in internals.policies_of(library.AutoAugment()):
        assert {first[0], second[0]} <= set(policies_strengths(library.AutoAugment()))
    assert "Color" not in policies_strengths(library.AugMix(all_ops=False))
    for name in ("AugMix", "RandAugment", "TrivialAugmentWide"):
        found = policies_strengths(getattr(library, name)())
        assert found["Equalize"] == (None, False)
        strengths, signed = found["Solarize"]
        assert strengths is not None
        assert (strengths.max(), strengths.min(), len(strengths), signed) == (255, 0, 10, False)
        strengths, signed = found["ShearX"]
        assert strengths is not None
        assert strengths.min() == 0
        assert signed


def policies_strengths(transform: Any) -> Any:
    return internals.policy_strengths(transform, 10, 32, 24)
