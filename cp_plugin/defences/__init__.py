"""Defences of a victim against poisons, for plain PyTorch; `Defence` puts them into Lightning.

`defended` wraps a data set (matrix completion, smoothing, JPEG, grey, bit depth, orthogonal
projection, purifiers); `Purified` does so by any module that purifies, such as `Denoiser` and
`DiffusionPurifier`; `Smoothing`, `Jpeg`, `Grey`, `BitDepth`, `GaussianNoise`, `Cutout`, `Ueraser`
are transforms; `adversarial_views` moves views against a loss; `worst_views` picks the worst of
several draws; `Mixing` mixes views and labels; `Private` and `with_group_norm` are differentially
private SGD; `complete_images` is matrix completion itself.
"""

from cp_plugin.defences.completion import Completions, complete_images, completions_of
from cp_plugin.defences.denoiser import Denoiser
from cp_plugin.defences.diffusion import DiffusionPurifier
from cp_plugin.defences.eraser import Ueraser, worst_views
from cp_plugin.defences.images import Purified, Smoothing, defended
from cp_plugin.defences.lowrank import complete, soft_threshold
from cp_plugin.defences.mixing import Mixing
from cp_plugin.defences.privacy import Private, with_group_norm
from cp_plugin.defences.projection import Projection
from cp_plugin.defences.squeezing import BitDepth, Grey, Jpeg
from cp_plugin.defences.views import Cutout, GaussianNoise, Pixels, adversarial_views

__all__ = [
    "BitDepth",
    "Completions",
    "Cutout",
    "Denoiser",
    "DiffusionPurifier",
    "GaussianNoise",
    "Grey",
    "Jpeg",
    "Mixing",
    "Pixels",
    "Private",
    "Projection",
    "Purified",
    "Smoothing",
    "Ueraser",
    "adversarial_views",
    "complete",
    "complete_images",
    "completions_of",
    "defended",
    "soft_threshold",
    "with_group_norm",
    "worst_views",
]
