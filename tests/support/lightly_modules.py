"""Modules as people write them with Lightly: one class a style, and what is to be found in it.

`MODULES` lists them. The root is a parameter, since `pytorch_lightning` and `lightning.pytorch`
have different classes. Networks are small and smooth, so that finite differences are exact.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DCLLoss,
    DINOLoss,
    MMCRLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    TiCoLoss,
    VICRegLoss,
)
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    NNMemoryBankModule,
    SMoGPrototypes,
    SwaVPrototypes,
)
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import (
    batch_shuffle,
    batch_unshuffle,
    deactivate_requires_grad,
    update_momentum,
)
from lightly.utils.benchmarking import OnlineLinearClassifier
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8
CLASSES = 3


@dataclass(frozen=True)
class Style:
    """A module and what a conforming adapter finds in it."""

    name: str
    build: Callable[[Any], Any]
    momentum: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (8, 8)
    """Sides of the views."""
    holds: bool = False
    """Whether other stop-gradients than the momentum branch's reach the loss."""
    cut: bool = True
    """Whether the module keeps gradients out of its momentum branch."""
    batch: str = "views, target, name"


MODULES: list[Style] = []


def style(**facts: Any) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def register(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
        MODULES.append(Style(build.__name__, build, **facts))
        return build

    return register


def backbone() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.Conv2d(6, WIDTH, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
    )


def head(out: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, 12, bias=False), nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, out)
    )


def base(root: Any) -> type:
    """The part that all share: an optimizer."""

    class Module(root.LightningModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Module


def online(root: Any) -> type:
    class Online(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone()
            self.projection_head = head()

        def forward(self, x: Tensor) -> Tensor:
            return self.projection_head(self.backbone(x).flatten(start_dim=1))

    return Online


def with_momentum(root: Any) -> type:
    class WithMomentum(online(root)):
        def __init__(self) -> None:
            super().__init__()
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)

        def forward_momentum(self, x: Tensor) -> Tensor:
            y = self.backbone_momentum(x).flatten(start_dim=1)
            return self.projection_head_momentum(y).detach()

        def update(self) -> None:
            momentum = cosine_schedule(self.current_epoch, 10, 0.996, 1)
            update_momentum(self.backbone, self.backbone_momentum, m=momentum)
            update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)

    return WithMomentum


MOMENTUM = ("backbone_momentum", "projection_head_momentum")


@style()
def simclr(root: Any) -> Any:
    class SimCLR(online(root)):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = NTXentLoss()

        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            (x0, x1) = batch[0]
            return self.criterion(self.forward(x0), self.forward(x1))

    return SimCLR()


@style(momentum=MOMENTUM)
def moco(root: Any) -> Any:
    class MoCo(with_momentum(root)):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = NTXentLoss(memory_bank_size=(24, WIDTH)).to(torch.get_default_dtype())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.update()
            x_query, x_key = batch[0]
            return self.criterion(self.forward(x_query), self.forward_momentum(x_key))

    return MoCo()


@style(momentum=("key_backbone", "key_projection_head"))
def moco_benchmark(root: Any) -> Any:
    """Not frozen, shuffled under no-grad, updated between passes, an online classifier beside."""

    class MoCoV2(online(root)):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.key_backbone = copy.deepcopy(self.backbone)
            self.key_projection_head = head()
            self.criterion = NTXentLoss(
                temperature=0.2, memory_bank_size=(24, WIDTH), gather_distributed=True
            ).to(torch.get_default_dtype())
            self.online_classifier = OnlineLinearClassifier(WIDTH, CLASSES, topk=(1, 2))

        @torch.no_grad()
        def forward_key_encoder(self, x: Tensor) -> Tensor:
            x, shuffle = batch_shuffle(batch=x, distributed=False)
            features = self.key_backbone(x).flatten(start_dim=1)
            projections = self.key_projection_head(features)
            features = batch_unshuffle(batch=features, shuffle=shuffle, distributed=False)
            return batch_unshuffle(batch=projections, shuffle=shuffle, distributed=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            views, targets = batch[0], batch[1]
            features = self.backbone(views[1]).flatten(start_dim=1)
            query = self.projection_head(features)
            update_momentum(self.backbone, self.key_backbone, m=0.999)
            update_momentum(self.projection_head, self.key_projection_head, m=0.999)
            loss = self.criterion(query, self.forward_key_encoder(views[0]))
            self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(targets))
            cls_loss, cls_log = self.online_classifier.training_step(
                (features.detach(), targets), batch_idx
            )
            self.log_dict(cls_log, sync_dist=True, batch_size=len(targets))
            return loss + cls_loss

    return MoCoV2()


@style(momentum=MOMENTUM)
def byol(root: Any) -> Any:
    class BYOL(with_momentum(root)):
        def __init__(self) -> None:
            super().__init__()
            self.prediction_head = head()
            self.criterion = NegativeCosineSimilarity()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.update()
            (x0, x1) = batch[0]
            p0 = self.prediction_head(self.forward(x0))
            z0 = self.forward_momentum(x0)
            p1 = self.prediction_head(self.forward(x1))
            z1 = self.forward_momentum(x1)
            return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))

    return BYOL()


@style(momentum=("teacher_backbone", "teacher_projection_head"))
def byol_benchmark(root: Any) -> Any:
    """A teacher that is not frozen, under no-grad; Lightly's own heads; a dictionary as result."""

    class BYOL(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone()
            self.projection_head = BYOLProjectionHead(WIDTH, 12, WIDTH)
            self.prediction_head = BYOLPredictionHead(WIDTH, 12, WIDTH)
            self.teacher_backbone = copy.deepcopy(self.backbone)
            self.teacher_projection_head = BYOLProjectionHead(WIDTH, 12, WIDTH)
            self.criterion = NegativeCosineSimilarity()
            self.online_classifier = OnlineLinearClassifier(WIDTH, CLASSES, topk=(1,))

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)

        def forward_student(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self(x).flatten(start_dim=1)
            return features, self.prediction_head(self.projection_head(features))

        @torch.no_grad()
        def forward_teacher(self, x: Tensor) -> Tensor:
            return self.teacher_projection_head(self.teacher_backbone(x).flatten(start_dim=1))

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            update_momentum(self.backbone, self.teacher_backbone, m=0.99)
            update_momentum(self.projection_head, self.teacher_projection_head, m=0.99)
            views, targets = batch[0], batch[1]
            teacher = [self.forward_teacher(view) for view in views]
            features, student_0 = self.forward_student(views[0])
            _, student_1 = self.forward_student(views[1])
            loss = 2 * self.criterion(teacher[0], student_1)
            loss = loss + 2 * self.criterion(teacher[1], student_0)
            self.log("train_loss", loss, sync_dist=True, batch_size=len(targets))
            cls_loss, _ = self.online_classifier.training_step(
                (features.detach(), targets), batch_idx
            )
            return {"loss": loss + cls_loss, "features": features}

    return BYOL()


def siamese(root: Any) -> type:
    class Siamese(online(root)):
        def __init__(self) -> None:
            super().__init__()
            self.prediction_head = head()
            self.criterion = NegativeCosineSimilarity()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.projection_head(self.backbone(x).flatten(start_dim=1))
            p = self.prediction_head(z)
            return z.detach(), p

    return Siamese


@style(holds=True)
def simsiam(root: Any) -> Any:
    class SimSiam(siamese(root)):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x0, x1), _, _ = batch
            z0, p0 = self.forward(x0)
            z1, p1 = self.forward(x1)
            loss = 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))
            self.log("train_loss_ssl", loss)
            return loss

    return SimSiam()


@style(holds=True, sizes=(8, 8, 8, 8))
def fastsiam(root: Any) -> Any:
    class FastSiam(siamese(root)):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            views, _, _ = batch
            features = [self.forward(view) for view in views]
            zs = torch.stack([z for z, _ in features])
            ps = torch.stack([p for _, p in features])
            loss = 0.0
            for i in range(len(views)):
                mask = torch.arange(len(views), device=self.device) != i
                loss += self.criterion(ps[i], torch.mean(zs[mask], dim=0)) / len(views)
            return loss

    return FastSiam()


@style(batch="views, target")
def barlow_twins(root: Any) -> Any:
    """All views in one pass, put together and taken apart again."""

    class BarlowTwins(online(root)):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = BarlowTwinsLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            views, _ = batch
            z0, z1 = self.forward(torch.cat(views)).chunk(2)
            return self.criterion(z0, z1)

    return BarlowTwins()


@style(batch="views")
def vicreg(root: Any) -> Any:
    """A data set of views alone, a step that takes only the batch."""

    class VICReg(online(root)):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = VICRegLoss()

        def training_step(self, batch: Any) -> Tensor:
            x0, x1 = batch
            return self.criterion(self(x0), self(x1))

    return VICReg()


@style(holds=True)
def nnclr(root: Any) -> Any:
    class NNCLR(siamese(root)):
        def __init__(self) -> None:
            super().__init__()
            self.memory_bank = NNMemoryBankModule(size=(16, WIDTH)).to(torch.get_default_dtype())
            self.criterion = NTXentLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x0, x1) = batch[0]
            z0, p0 = self.forward(x0)
            z1, p1 = self.forward(x1)
            z0 = self.memory_bank(z0, update=False)
            z1 = self.memory_bank(z1, update=True)
            return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))

    return NNCLR()


@style(holds=True, sizes=(8, 8, 6, 6))
def swav(root: Any) -> Any:
    """Crops of two sizes, frozen prototypes of the projection's own shape, queues, normalising."""

    class SwaV(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone()
            self.projection_head = nn.Sequential(
                nn.Linear(WIDTH, WIDTH, bias=False), nn.GELU(), nn.Linear(WIDTH, WIDTH, bias=False)
            )
            self.prototypes = SwaVPrototypes(WIDTH, WIDTH, n_steps_frozen_prototypes=1)
            self.queues = nn.ModuleList([MemoryBankModule(size=(12, WIDTH)) for _ in range(2)])
            self.queues.to(torch.get_default_dtype())
            self.criterion = SwaVLoss()

        def forward(self, x: Tensor) -> Tensor:
            x = self.projection_head(self.backbone(x).flatten(start_dim=1))
            return nn.functional.normalize(x, dim=1, p=2)

        @torch.no_grad()
        def queued(self, features: list[Tensor]) -> list[Tensor]:
            found = [
                queue(z, update=True)[1].T for queue, z in zip(self.queues, features, strict=True)
            ]
            return [self.prototypes(z, self.current_epoch) for z in found]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.prototypes.normalize()
            features = [self.forward(view.to(self.device)) for view in batch[0]]
            logits = [self.prototypes(z, self.current_epoch) for z in features]
            return self.criterion(logits[:2], logits[2:], self.queued(features[:2]))

    return SwaV()


@style(momentum=("teacher_backbone", "teacher_head"), sizes=(8, 8, 6), cut=False)
def dino(root: Any) -> Any:
    """A frozen teacher in grad mode; its head is not a copy but one of its own."""

    class DINO(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.student_backbone = backbone()
            self.student_head = DINOProjectionHead(WIDTH, 12, 6, 10, freeze_last_layer=1)
            self.teacher_backbone = copy.deepcopy(self.student_backbone)
            self.teacher_head = DINOProjectionHead(WIDTH, 12, 6, 10)
            deactivate_requires_grad(self.teacher_backbone)
            deactivate_requires_grad(self.teacher_head)
            self.criterion = DINOLoss(output_dim=10, warmup_teacher_temp_epochs=5)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            update_momentum(self.student_backbone, self.teacher_backbone, m=0.99)
            update_momentum(self.student_head, self.teacher_head, m=0.99)
            views = [view.to(self.device) for view in batch[0]]
            teacher = [
                self.teacher_head(self.teacher_backbone(v).flatten(start_dim=1)) for v in views[:2]
            ]
            student = [
                self.student_head(self.student_backbone(v).flatten(start_dim=1)) for v in views
            ]
            return self.criterion(teacher, student, epoch=self.current_epoch)

        def on_after_backward(self) -> None:
            self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)

    return DINO()


@style(momentum=("backbone", "projection_head"), sizes=(8, 8, 6, 6))
def dino_benchmark(root: Any) -> Any:
    """The plain names are the teacher's, frozen as training starts; its features are probed."""

    class DINO(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone()
            self.projection_head = head(10)
            self.student_backbone = copy.deepcopy(self.backbone)
            self.student_projection_head = head(10)
            self.criterion = DINOLoss(output_dim=10)
            self.online_eval = OnlineLinearClassifier(WIDTH, CLASSES, topk=(1,))

        def on_train_start(self) -> None:
            deactivate_requires_grad(self.backbone)
            deactivate_requires_grad(self.projection_head)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            update_momentum(self.student_backbone, self.backbone, m=0.996)
            update_momentum(self.student_projection_head, self.projection_head, m=0.996)
            views, targets = batch[0], batch[1]
            large, small = torch.cat(views[:2]), torch.cat(views[2:])
            with torch.no_grad():
                features = self.backbone(large).flatten(start_dim=1)
                teacher = self.projection_head(features)
            student = torch.cat(
                [
                    self.student_projection_head(self.student_backbone(x).flatten(start_dim=1))
                    for x in (large, small)
                ]
            )
            loss = self.criterion(teacher.chunk(2), student.chunk(len(views)), teacher_temp=0.4)
            self.log_dict({"train_loss": loss}, sync_dist=True, batch_size=len(targets))
            cls_loss, _ = self.online_eval.training_step(
                (features.chunk(2)[0].detach(), targets), batch_idx
            )
            return loss + cls_loss

    return DINO()


@style()
def dcl(root: Any) -> Any:
    """Two heads of one shape that both train, called key and query; no momentum branch."""

    class DCL(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone()
            self.query_head, self.key_head = head(), head()
            self.criterion = DCLLoss()

        def training_step(self, *args: Any) -> Tensor:
            x0, x1 = args[0][0]
            z0 = self.query_head(self.backbone(x0).flatten(1))
            return self.criterion(z0, self.key_head(self.backbone(x1).flatten(1)))

    return DCL()


@style(momentum=MOMENTUM, holds=True)
def tico(root: Any) -> Any:
    class TiCo(with_momentum(root)):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = TiCoLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x0, x1) = batch[0]
            self.update()
            return self.criterion(self.forward(x0), self.forward_momentum(x1))

    return TiCo()


@style(momentum=MOMENTUM, sizes=(8, 8, 8))
def mmcr(root: Any) -> Any:
    class MMCR(with_momentum(root)):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = MMCRLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.update()
            z_o = torch.stack([self(x) for x in batch[0]], dim=1)
            z_m = torch.stack([self.forward_momentum(x) for x in batch[0]], dim=1)
            return self.criterion(z_o, z_m)

    return MMCR()


@style(holds=True)
def smog(root: Any) -> Any:
    """Assignments are indices, groups are state, views are swapped by the batch's number."""

    class SMoG(with_momentum(root)):
        def __init__(self) -> None:
            super().__init__()
            self.prediction_head = head()
            self.memory_bank = MemoryBankModule(size=(16, WIDTH)).to(torch.get_default_dtype())
            groups = torch.nn.functional.normalize(torch.rand(5, WIDTH), dim=1)
            self.smog = SMoGPrototypes(group_features=groups, beta=0.99)
            self.criterion = nn.CrossEntropyLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.update()
            (x0, x1) = batch[0]
            if batch_idx % 2:
                x0, x1 = x1, x0
            encoded = self.forward(x0)
            predicted = self.prediction_head(encoded)
            key = self.projection_head_momentum(self.backbone_momentum(x1).flatten(start_dim=1))
            assignments = self.smog.assign_groups(key)
            groups = self.smog.get_updated_group_features(encoded)
            logits = self.smog(predicted, groups, temperature=0.1)
            self.smog.set_group_features(groups)
            self.memory_bank(encoded, update=True)
            return self.criterion(logits, assignments)

    return SMoG()


@style(momentum=("nets.target",), batch="views, target")
def containers(root: Any) -> Any:
    """Networks in a ModuleDict; the target, without predictor, moves when a batch has ended."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.projector = backbone(), head()

        def forward(self, x: Tensor) -> Tensor:
            return self.projector(self.encoder(x).flatten(1))

    class Predicting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = head()

        def forward(self, x: Tensor) -> Tensor:
            return self.predictor(super().forward(x))

    class Containers(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleDict({"online": Predicting(), "target": Net()})
            self.nets["target"].load_state_dict(self.nets["online"].state_dict(), strict=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (a, b), _ = batch
            with torch.no_grad():
                targets = [F.normalize(self.nets["target"](x), dim=1) for x in (a, b)]
            online = [F.normalize(self.nets["online"](x), dim=1) for x in (b, a)]
            return sum(2 - 2 * (p * z).sum(1).mean() for p, z in zip(online, targets, strict=True))

        def on_train_batch_end(self, *_: Any) -> None:
            target = dict(self.nets["target"].named_parameters())
            for name, parameter in self.nets["online"].named_parameters():
                if name in target:
                    target[name].data.lerp_(parameter.data, 0.01)

    return Containers()


@style(momentum=("hidden.0", "hidden.1"))
def hidden_list(root: Any) -> Any:
    """Copies in a plain list, so that neither optimizer nor checkpoint sees them."""

    class Hidden(online(root)):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [copy.deepcopy(self.backbone), copy.deepcopy(self.projection_head)]
            self.criterion = NTXentLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x0, x1) = batch[0]
            z1 = self.hidden[1](self.hidden[0](x1).flatten(start_dim=1)).detach()
            return self.criterion(self(x0), z1)

        def on_before_zero_grad(self, *_: Any) -> None:
            update_momentum(self.backbone, self.hidden[0], m=0.99)
            update_momentum(self.projection_head, self.hidden[1], m=0.99)

    return Hidden()


@style(momentum=("averaged",))
def averaged_model(root: Any) -> Any:
    """torch's own AveragedModel around the whole network."""

    class Averaged(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(backbone(), nn.Flatten(), head())
            self.averaged = torch.optim.swa_utils.AveragedModel(self.model)
            self.predictor = head()
            self.criterion = NegativeCosineSimilarity()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x0, x1) = batch[0]
            with torch.no_grad():
                z0, z1 = self.averaged(x0), self.averaged(x1)
            p0, p1 = self.predictor(self.model(x0)), self.predictor(self.model(x1))
            self.averaged.update_parameters(self.model)
            return self.criterion(p0, z1) + self.criterion(p1, z0)

    return Averaged()


@style(momentum=("copy_of_net",))
def odd_names(root: Any) -> Any:
    """Nothing is called by its role, nothing is frozen, features are taken by a forward hook."""

    class Odd(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(backbone(), nn.Flatten(), head())
            self.copy_of_net = copy.deepcopy(self.net)
            self.features: list[Tensor] = []
            self.net[1].register_forward_hook(lambda _, __, out: self.features.append(out))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x0, x1 = batch[0]
            z0, z1 = self.net(x0), self.copy_of_net(x1).detach()
            y0 = self.features.pop()
            with torch.no_grad():
                for a, b in zip(self.copy_of_net.parameters(), self.net.parameters(), strict=True):
                    a.mul_(0.99).add_(b, alpha=0.01)
            return (z0 - z1).square().mean() + y0.square().mean()

    return Odd()


@style()
def twin_classifiers(root: Any) -> Any:
    """Two classifiers of one shape beside SimCLR, one of them frozen for good."""

    class Twins(online(root)):
        def __init__(self) -> None:
            super().__init__()
            self.classifier_a = nn.Linear(WIDTH, CLASSES)
            self.classifier_b = nn.Linear(WIDTH, CLASSES).requires_grad_(False)
            self.criterion = NTXentLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x0, x1), targets = batch[0], batch[1]
            y0, y1 = (self.backbone(x).flatten(1) for x in (x0, x1))
            loss = self.criterion(self.projection_head(y0), self.projection_head(y1))
            for classifier in (self.classifier_a, self.classifier_b):
                loss = loss + F.cross_entropy(classifier(y0.detach()), targets)
            return loss

    return Twins()
