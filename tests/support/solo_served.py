"""The methods of solo-learn that the conformance suite runs over, with small settings."""

from __future__ import annotations

from typing import Any

HEADS = {"proj_output_dim": 8, "proj_hidden_dim": 16, "pred_hidden_dim": 16}
QUEUE = {**HEADS, "temperature": 0.2, "queue_size": 32}
WEIGHTS = {"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0}
PROTOTYPES = {**HEADS, "temperature": 0.1, "num_prototypes": 12}
SERVED: dict[str, dict[str, Any]] = {
    "all4one": {**QUEUE, "pred_hidden_dim": 8},
    "barlow_twins": {**HEADS, "lamb": 0.0051, "scale_loss": 0.024},
    "byol": HEADS,
    "deepclusterv2": {**PROTOTYPES, "num_prototypes": [12, 12]},
    "dino": {
        **PROTOTYPES,
        "clip_grad": 0,
        "freeze_last_layer": True,
        "use_bn_in_head": True,
        "norm_last_layer": True,
        "student_temperature": 0.5,
        "teacher_temperature": 0.4,
        "warmup_teacher_temperature": 0.4,
        "warmup_teacher_temperature_epochs": 2,
    },
    "mae": {
        **{"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2},
        **{"mask_ratio": 0.5, "norm_pix_loss": False},
    },
    "mocov2plus": QUEUE,
    "mocov3": {**HEADS, "temperature": 0.2},
    "nnbyol": QUEUE,
    "nnclr": QUEUE,
    "nnsiam": QUEUE,
    "ressl": {**QUEUE, "temperature_q": 0.5, "temperature_k": 0.4},
    "simclr": {**HEADS, "temperature": 0.2},
    "simsiam": HEADS,
    "swav": {**PROTOTYPES, "queue_size": 16, "epoch_queue_starts": 0},
    "vibcreg": {**HEADS, **WEIGHTS, "iternorm": True},
    "vicreg": {**HEADS, **WEIGHTS},
    "wmse": {**HEADS, "whitening_iters": 2, "whitening_size": 8, "whitening_eps": 0.1},
}
ONE_VIEW = {"mae"}
"""Methods that compare no two views."""
MOMENTUM = {"all4one", "byol", "dino", "mocov2plus", "mocov3", "ressl"}
"""nnbyol has a momentum branch too, but it only picks keys from a queue."""
