"""Methods that compare no two views, or hide parts of them, as people write them with Lightly.

Vision transformers on pictures of 8 x 8 pixels in patches of 2; masks are drawn anew in every step.
`MASKED` lists the modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightly.loss import CAPILoss, DINOLoss, IBOTPatchLoss
from lightly.models import utils
from lightly.models.modules import (
    AIMPredictionHead,
    CAPIPredictorTIMM,
    DINOProjectionHead,
    IJEPAPredictorTIMM,
    MaskedCausalVisionTransformer,
    MaskedVisionTransformerDecoderTIMM,
    MaskedVisionTransformerTIMM,
)
from lightly.models.modules.heads import CAPIProjectionHead
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.lightly_modules import Style, base

SIDE, PATCH, WIDTH = 8, 2, 16
GRID = SIDE // PATCH
MASKED: list[Style] = []


def masked(**facts: Any) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def register(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
        MASKED.append(Style(build.__name__, build, **{"sizes": (SIDE,), **facts}))
        return build

    return register


def vit(**settings: Any) -> MaskedVisionTransformerTIMM:
    shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "num_classes": 0}
    return MaskedVisionTransformerTIMM(
        VisionTransformer(**shape, depth=2, num_heads=2, drop_path_rate=0.1, **settings)
    )


def decoder() -> MaskedVisionTransformerDecoderTIMM:
    return MaskedVisionTransformerDecoderTIMM(
        num_patches=GRID**2, embed_dim=WIDTH, depth=1, num_heads=2
    )


@masked()
def mae(root: Any) -> Any:
    class MAE(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.decoder = vit(), decoder()
            self.head = nn.Linear(WIDTH, 3 * PATCH**2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (images,) = batch[0]
            length = self.backbone.sequence_length
            kept, hidden = utils.random_token_mask((len(images), length), mask_ratio=0.5)
            seen = self.backbone.encode(images=images, idx_keep=kept)
            tokens = utils.set_at_index(seen.new_zeros(len(images), length, WIDTH), kept, seen)
            tokens = self.decoder(tokens, idx_mask=hidden)
            made = self.head(utils.get_at_index(tokens, hidden))
            wanted = utils.get_at_index(utils.patchify(images, PATCH), hidden - 1)
            return F.mse_loss(made, wanted)

    return MAE()


@masked()
def simmim(root: Any) -> Any:
    class SimMIM(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.decoder = vit(), nn.Linear(WIDTH, 3 * PATCH**2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (images,) = batch[0]
            shape = (len(images), self.backbone.sequence_length)
            _, hidden = utils.random_token_mask(shape, mask_ratio=0.5)
            tokens = self.backbone.encode(images=images, idx_mask=hidden)
            made = self.decoder(utils.get_at_index(tokens, hidden))
            wanted = utils.get_at_index(utils.patchify(images, PATCH), hidden - 1)
            return F.smooth_l1_loss(made, wanted)

    return SimMIM()


@masked()
def aim(root: Any) -> Any:
    class AIM(base(root)):
        def __init__(self) -> None:
            super().__init__()
            shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2}
            self.backbone = MaskedCausalVisionTransformer(
                **shape, num_heads=2, class_token=False, no_embed_class=True, global_pool="avg"
            )
            self.head = AIMPredictionHead(WIDTH, 3 * PATCH**2, num_blocks=1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (images,) = batch[0]
            mask = utils.random_prefix_mask((len(images), GRID**2), max_prefix_length=GRID**2 - 1)
            made = self.head(self.backbone.forward_features(images, mask=mask))
            wanted = utils.normalize_mean_var(utils.patchify(images, PATCH))
            return F.mse_loss(made, wanted)

    return AIM()


@masked(momentum=("target_encoder",))
def ijepa(root: Any) -> Any:
    class IJEPA(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = vit(class_token=False, global_pool="avg")
            self.target_encoder = copy.deepcopy(self.encoder)
            self.predictor = IJEPAPredictorTIMM(
                num_patches=GRID**2, depth=1, mlp_dim=WIDTH, predictor_embed_dim=8, num_heads=2
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (images,) = batch[0]
            utils.update_momentum(self.encoder, self.target_encoder, m=0.99)
            kept, hidden = utils.random_token_mask(
                (len(images), GRID**2), mask_ratio=0.4, mask_class_token=True
            )
            with torch.no_grad():
                target = self.target_encoder.encode(images=images)
                target = utils.apply_masks(F.layer_norm(target, (WIDTH,)), [hidden])
            context = self.encoder.encode(images=images, idx_keep=kept)
            return F.smooth_l1_loss(self.predictor(context, [kept], [hidden]), target)

    return IJEPA()


@masked(momentum=("teacher_backbone",), holds=True)
def capi(root: Any) -> Any:
    """The teacher's head trains by a loss of its own, on what the teacher gives it."""

    class CAPI(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.student_backbone = vit()
            self.teacher_backbone = copy.deepcopy(self.student_backbone).requires_grad_(False)
            self.student_head = CAPIProjectionHead(WIDTH, num_clusters=6, weight_norm=True)
            self.teacher_head = CAPIProjectionHead(WIDTH, num_clusters=6, bias=True)
            self.predictor = CAPIPredictorTIMM(WIDTH, grid_size=GRID, depth=1, num_heads=2)
            self.criterion = CAPILoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (images,) = batch[0]
            utils.update_momentum(self.student_backbone, self.teacher_backbone, m=0.99)
            kept, hidden = utils.random_token_mask((len(images), GRID**2 + 1), mask_ratio=0.5)
            seen = self.student_backbone.encode(images=images, idx_keep=kept)[:, 1:]
            predicted = self.predictor(
                context=seen, context_positions=kept[:, 1:] - 1, query_positions=hidden - 1
            )
            with torch.no_grad():
                tokens = self.teacher_backbone.encode(images=images)
            target = self.teacher_head(tokens)[:, 1:]
            student = self.student_head(predicted)
            return self.criterion(
                teacher_logits=target, student_logits=student, teacher_index=hidden - 1
            ) + self.criterion(teacher_logits=target, student_logits=target)

    return CAPI()


@masked(momentum=("teacher_backbone", "teacher_head"), sizes=(SIDE, SIDE), holds=True)
def ibot(root: Any) -> Any:
    """Self-distillation of two views, one of them with blocks hidden."""

    class IBOT(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.student_backbone, self.student_head = vit(), self.head()
            self.teacher_backbone = copy.deepcopy(self.student_backbone).requires_grad_(False)
            self.teacher_head = self.head().requires_grad_(False)
            self.views_loss = DINOLoss(output_dim=12)
            self.patch_loss = IBOTPatchLoss(output_dim=12)

        @staticmethod
        def head() -> Any:
            return DINOProjectionHead(WIDTH, 12, bottleneck_dim=8, output_dim=12)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images = torch.cat(batch[0])
            blocks = utils.random_block_mask((len(images), GRID, GRID), min_num_masks_per_block=1)
            mask = F.pad(blocks.flatten(1), (1, 0))
            with torch.no_grad():
                tokens = self.teacher_backbone.encode(images)
                teacher, teacher_hidden = map(self.teacher_head, (tokens[:, 0], tokens[mask]))
            tokens = self.student_backbone.encode(images, mask=mask)
            student, student_hidden = map(self.student_head, (tokens[:, 0], tokens[mask]))
            return self.views_loss(
                teacher.chunk(2), student.chunk(2), teacher_temp=0.5
            ) + self.patch_loss(teacher_hidden, student_hidden, blocks, teacher_temp=0.5)

        def on_train_batch_end(self, *_: Any) -> None:
            utils.update_momentum(self.student_backbone, self.teacher_backbone, m=0.99)
            utils.update_momentum(self.student_head, self.teacher_head, m=0.99)

    return IBOT()
