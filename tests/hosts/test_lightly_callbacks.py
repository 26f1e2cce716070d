"""What Lightly's users run: trainers of both roots, data of every form, and what is refused."""

import logging

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.transforms import DINOTransform
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import PILToTensor

from cp_plugin import CraftPoison, InjectPoison, KNNMonitor, Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from tests.support.lightly_modules import CLASSES, MODULES, backbone, head, online, with_momentum

ROOTS = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*recommended to use `self.log.*sync_dist=True.*"),
]
TWO_VIEWS = SimCLRTransform(input_size=32, gaussian_blur=0)
CRAFT = {"rounds": 2, "model_steps": 1, "noise_steps": 3, "pgd_steps": 1}


class Styled(Dataset):
    """Photographs in the form that a module expects."""

    def __init__(self, form, transform):
        self.photos = Photos(train=True, patches=2)
        self.form, self.transform = form, transform
        self.targets = [row % CLASSES for row in range(len(self.photos))]

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, row):
        views = self.transform(Image.fromarray(self.photos.data[row]))
        forms = {
            "views, target, name": (views, self.targets[row], f"{row}.png"),
            "views, target": (views, self.targets[row]),
            "views": views,
        }
        return forms[self.form]


def fit(root, module, data, tmp_path, *callbacks, **settings):
    chosen = {"max_epochs": 2, "logger": False, "enable_progress_bar": False} | settings
    trainer = root.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **chosen,
    )
    loader = data
    if not isinstance(data, DataLoader):
        loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    trainer.fit(module, loader)
    return trainer


def transform_for(sizes):
    if len(set(sizes)) > 1:
        local = len(sizes) - 2
        return DINOTransform(
            global_crop_size=16, local_crop_size=8, n_local_views=local, gaussian_blur=(0, 0, 0)
        )
    return MultiViewTransform([TWO_VIEWS.transforms[0]] * len(sizes))


@pytest.mark.parametrize("style", MODULES, ids=lambda style: style.name)
def test_every_style_is_crafted_with(style, tmp_path, caplog):
    """In a trainer, log lines and hooks included; what was found is logged once."""
    root = ROOTS["pytorch_lightning" if len(style.name) % 2 else "lightning.pytorch"]
    torch.manual_seed(0)
    data = Styled(style.batch, transform_for(style.sizes))
    with caplog.at_level(logging.INFO, logger="cp_plugin"):
        fit(root, style.build(root), data, tmp_path, CraftPoison(**CRAFT))
    poison = Poison.load(tmp_path / "poison.safetensors")
    assert len(poison.perturbation) == len(data)
    found = [r.getMessage() for r in caplog.records if r.getMessage().startswith("momentum branch")]
    assert len(found) == 1
    assert found[0].endswith(": " + (", ".join(style.momentum) or "none"))


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_a_folder_behind_lightlys_data_set(root, image_folder, tmp_path):
    folder = image_folder(per_class=6)
    (style,) = [style for style in MODULES if style.name == "moco_benchmark"]
    craft = CraftPoison(granularity="class", **CRAFT)
    data = LightlyDataset(str(folder), transform=TWO_VIEWS)
    fit(root, style.build(root), data, tmp_path, craft)
    assert Poison.load(tmp_path / "poison.safetensors").classes == tuple(data.dataset.classes)
    assert data.transform is TWO_VIEWS


def test_hooks_around_the_transfer_see_their_own_batches(tmp_path):
    class Hooks(online(lightning.pytorch)):
        seen = 0

        def on_before_batch_transfer(self, batch, dataloader_idx):
            (_, _), _ = batch
            return batch

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            views, target = batch
            return [view.to(device) for view in views], target.to(device)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            (x0, x1), target = batch
            return {"images": (x0 * 2, x1 * 2), "target": target}

        def training_step(self, batch, batch_idx):
            x0, x1 = batch["images"]
            return NTXentLoss()(self(x0), self(x1))

    module = Hooks()
    fit(
        lightning.pytorch,
        module,
        Styled("views, target", TWO_VIEWS),
        tmp_path,
        CraftPoison(**CRAFT),
    )
    assert not {"on_before_batch_transfer", "on_after_batch_transfer"} & set(vars(module))


def test_momentum_modules_can_be_named(tmp_path, caplog):
    (style,) = [style for style in MODULES if style.name == "moco"]
    craft = CraftPoison(momentum_modules=["backbone_momentum"], **CRAFT)
    data = Styled(style.batch, TWO_VIEWS)
    with caplog.at_level(logging.INFO, logger="cp_plugin"):
        fit(lightning.pytorch, style.build(lightning.pytorch), data, tmp_path, craft)
    assert "momentum branch of MoCo: backbone_momentum" in caplog.messages
    wrong = CraftPoison(momentum_modules=["teacher"], dir=str(tmp_path / "b"), **CRAFT)
    with pytest.raises(UserError, match=r"names 'teacher', .* known: backbone, projection_head"):
        fit(lightning.pytorch, style.build(lightning.pytorch), data, tmp_path, wrong)


def test_a_branch_that_is_built_anew_is_followed(tmp_path):
    """SMoG replaces its momentum networks now and then."""

    class Rebuilt(with_momentum(lightning.pytorch)):
        def training_step(self, batch, batch_idx):
            if self.training:
                import copy

                self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
            (x0, x1), _ = batch
            return (self(x0) - self.forward_momentum(x1)).square().mean()

    craft = CraftPoison(**CRAFT | {"rounds": 4})
    module = Rebuilt()
    fit(lightning.pytorch, module, Styled("views, target", TWO_VIEWS), tmp_path, craft)
    assert craft.attack._gradients.momentum_modules[0] is module.backbone_momentum


def test_a_branch_that_never_runs_is_left_out_with_a_warning(tmp_path, caplog):
    class Idle(with_momentum(lightning.pytorch)):
        def training_step(self, batch, batch_idx):
            (x0, x1), _ = batch
            return NTXentLoss()(self(x0), self(x1))

    fit(
        lightning.pytorch,
        Idle(),
        Styled("views, target", TWO_VIEWS),
        tmp_path,
        CraftPoison(**CRAFT),
    )
    assert any("never ran" in message for message in caplog.messages)
    assert (tmp_path / "poison.safetensors").is_file()


class Refused(online(lightning.pytorch)):
    """SimCLR, to be spoilt."""

    def loss(self, batch):
        return NTXentLoss()(self(batch[0][0]), self(batch[0][1]))

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Supervised(Refused):
    def training_step(self, batch, batch_idx):
        z = F.normalize(self(batch[0][0]), dim=1)
        same = (batch[1][:, None] == batch[1][None]).float()
        return (z @ z.T - same).square().mean()


class Attached(Refused):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, CLASSES)

    def training_step(self, batch, batch_idx):
        features = self.backbone(batch[0][0]).flatten(1)
        return self.loss(batch) + F.cross_entropy(self.linear(features), batch[1])


class Cut(with_momentum(lightning.pytorch)):
    def training_step(self, batch, batch_idx):
        target = self.forward_momentum(batch[0][1].data)
        return (self(batch[0][0]) - target).square().mean()


class Nothing(Refused):
    def training_step(self, batch, batch_idx):
        return (
            {"log": self.loss(batch).detach(), "loss": None}
            if not self.training
            else self.loss(batch)
        )


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Supervised, r"the loss of Supervised depends on the labels .* leave the supervised term"),
        (Attached, r"the loss of Attached depends on the labels"),
        (Cut, r"the loss of Cut uses what .* returns, but no gradient reaches it: .* \(\.data,"),
        (Nothing, r"Nothing\.training_step must return the loss or a dict with `loss`, got"),
    ],
)
def test_modules_that_do_not_fit(module, says, tmp_path):
    data = Styled("views, target", TWO_VIEWS)
    with pytest.raises(UserError, match=says):
        fit(lightning.pytorch, module(), data, tmp_path, CraftPoison(**CRAFT))
    assert not (tmp_path / "poison.safetensors").exists()


class Stream(IterableDataset):
    def __iter__(self):
        yield from Styled("views, target", TWO_VIEWS)


def only_targets(items):
    return torch.tensor([target for _, target in items])


class Alone(Dataset):
    """Its transform is nowhere to be found."""

    def __len__(self):
        return 16

    def __getitem__(self, row):
        return [torch.zeros(3, 32, 32)] * 2, 0


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), r"Stream has no attribute `transform`"),
        (lambda: Alone(), r"Alone has no attribute `transform`"),
        (
            lambda: DataLoader(Styled("views, target", TWO_VIEWS), collate_fn=only_targets),
            r"collate_fn of the data loader does not keep the views",
        ),
    ],
)
def test_data_that_does_not_fit(data, says, tmp_path):
    with pytest.raises(UserError, match=says):
        fit(lightning.pytorch, Refused(), data(), tmp_path, CraftPoison(**CRAFT))


def test_several_optimizers_are_refused(tmp_path):
    """By Lightning itself: it serves them under manual optimization alone."""

    class Several(Refused):
        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.1) for part in self.children()]

    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual"):
        fit(
            *(lightning.pytorch, Several(), Styled("views, target", TWO_VIEWS)),
            *(tmp_path, CraftPoison(**CRAFT)),
        )


class Pixels:
    """Two views that are the images themselves, 8 bit as floats."""

    def __call__(self, image):
        return [PILToTensor()(image).float()] * 2


@pytest.mark.parametrize("granularity", ["class", "sample"])
def test_injected_pixels_are_those_of_the_exported_images(granularity, image_folder, tmp_path):
    """What a module sees through `InjectPoison` equals what the embedded engine reads from PNG."""
    from cp_plugin.apps.export import export
    from cp_plugin.data import image_key, load

    folder = image_folder(per_class=4)
    craft = CraftPoison(granularity=granularity, **CRAFT)
    fit(
        *(lightning.pytorch, Refused(), LightlyDataset(str(folder), transform=TWO_VIEWS)),
        *(tmp_path, craft),
    )
    poison = Poison.load(tmp_path / "poison.safetensors")
    seen = {}

    class Records(online(lightning.pytorch)):
        def training_step(self, batch, batch_idx):
            (x0, _), _, names = batch
            seen.update(zip(names, x0, strict=True))
            return NTXentLoss()(self(x0 / 255), self(x0 / 255))

    data = LightlyDataset(str(folder), transform=Pixels())
    fit(lightning.pytorch, Records(), data, tmp_path, InjectPoison(poison), max_epochs=3)
    exported = tmp_path / "exported"
    export(tmp_path / "poison.safetensors", exported, folder)
    victims, _ = load("custom", exported)
    assert len(victims) == len(data)
    carriers = None if poison.keys is None else set(poison.keys.tolist())
    for row, (path, _) in enumerate(victims.samples):
        name = path.removeprefix(f"{exported}/")
        pixels = torch.from_numpy(np.array(victims[row][0])).permute(2, 0, 1).float()
        if name in seen:
            assert torch.equal(seen[name], pixels), name
            clean = torch.from_numpy(np.array(Image.open(folder / name))).permute(2, 0, 1)
            # Whoever no batch of the craft brought stays clean.
            carries = carriers is None or image_key(clean) in carriers
            assert bool((clean != pixels).any()) == carries, name
    assert len(seen) >= 8


def test_monitoring_with_an_online_classifier_beside(tmp_path):
    """Also a module that optimises by hand, or whose encoder has a name of its own."""

    class Renamed(lightning.pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.trunk, self.neck = backbone(), head()

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            x0, x1 = batch[0]
            z0, z1 = (self.neck(self.trunk(x).flatten(1)) for x in (x0, x1))
            optimizer.zero_grad()
            self.manual_backward(NTXentLoss()(z0, z1))
            optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = Photos(train=True, patches=2, transform=TWO_VIEWS)
    settings = {"query": Photos(train=False, patches=1), "every_n_epochs": 1, "k": 3}
    monitor = KNNMonitor(encoder="trunk", **settings)
    fit(lightning.pytorch, Renamed(), data, tmp_path, monitor, max_epochs=1)
    assert 0 <= monitor.results[0]["knn_clean_bank"] <= 100
    for encoder, says in (
        (None, "no encoder under the usual names"),
        ("stem", "no network called"),
    ):
        with pytest.raises(UserError, match=says):
            fit(
                *(lightning.pytorch, Renamed(), data, tmp_path),
                KNNMonitor(encoder=encoder, **settings),
                max_epochs=1,
            )


def test_crafting_needs_no_encoder_name(tmp_path):
    class Anonymous(lightning.pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            self.trunk, self.neck = backbone(), head()

        def training_step(self, batch, batch_idx):
            x0, x1 = batch[0]
            return NTXentLoss()(*(self.neck(self.trunk(x).flatten(1)) for x in (x0, x1)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    fit(
        *(
            lightning.pytorch,
            Anonymous(),
            Styled("views, target", TWO_VIEWS),
        ),
        *(tmp_path, CraftPoison(**CRAFT)),
    )
    assert Poison.load(tmp_path / "poison.safetensors").info["backbone"] == "unknown"
