"""Settings of the poisons that contrastive poisoning is compared with: frozen and checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args

from cp_plugin.config.settings import (
    EPOCH,
    RANDOM,
    ZERO,
    AlternationConfig,
    CraftConfig,
    Fit,
    Granularity,
    OptimisedConfig,
    RowType,
    Steps,
    UserError,
    at_least_one,
    check_eps,
    check_fit,
    check_fraction,
    check_image_size,
    check_positive,
    one_of,
)

Distribution = Literal["uniform", "gaussian"]


@dataclass(frozen=True)
class SampledConfig:
    """A poison that is sampled, not optimised."""

    eps: float = 8 / 255
    """Largest change of a pixel, in [0, 1]."""
    granularity: Granularity = "sample"
    """One sample an image or one a class."""
    fraction: float = 1.0
    """Part of the images that is poisoned, class-balanced where there are labels."""
    seed: int | None = None
    """None: the run's seed."""
    image_size: int | None = None
    """As that of the poison it is compared with, where that was set."""
    fit: Fit = "crop"
    """As that of the poison it is compared with."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        check_eps(self.eps)
        check_image_size(self.image_size)
        check_fit(self.fit)
        one_of("granularity", self.granularity, get_args(Granularity))
        check_fraction(self.fraction)


@dataclass(frozen=True)
class RandomConfig(SampledConfig):
    """Random noise in [-eps, eps]: what any poison has to beat."""

    distribution: Distribution = "uniform"
    """`gaussian`: of standard deviation eps, clipped at eps."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        super().__post_init__()
        one_of("distribution", self.distribution, get_args(Distribution))


@dataclass(frozen=True)
class SyntheticConfig(SampledConfig):
    """Linearly separable noise (Yu et al., "Availability Attacks Create Shortcuts", KDD 2022).

    With granularity `sample` every image has a point of its own in the cluster of its class, with
    `class` the images of a class share one.
    """

    patch: int = 8
    """Side in pixels of the squares of one value; the paper uses 8."""
    separation: float = 10.0
    """Distance of a class's centre from 0 along each axis, in standard deviations of its points."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        super().__post_init__()
        at_least_one("patch", self.patch)
        if not 1 <= self.separation <= 1000:
            raise UserError(
                f"poison.separation must be in [1, 1000], got {self.separation}; below 1 the "
                "classes' points overlap. The default is 10."
            )


@dataclass(frozen=True)
class ErrorMinConfig(AlternationConfig):
    """Error-minimising noise (Huang et al., "Unlearnable Examples", ICLR 2021, section 4)."""

    rounds: int = 50
    """Alternations; the paper goes on until the surrogate fits 99 % of the poisoned images."""
    model_steps: Steps = 10
    """M: optimiser steps of the surrogate a round, or `epoch`."""
    noise_steps: Steps = EPOCH
    """N: batches on which delta is optimised a round, or `epoch`."""
    pgd_steps: int = 20
    """T: sign-gradient steps on each of these batches; the paper takes 1 for one delta a class."""


@dataclass(frozen=True)
class AueConfig(ErrorMinConfig):
    """Augmented unlearnable examples (Wang et al., NeurIPS 2024): error-minimising noise.

    It differs by the surrogate's contrastive augmentations, of the strength that the group file
    gives, and by its schedule.
    """

    rounds: int = 60
    """Alternations, each an epoch of the surrogate and an epoch of noise."""
    model_steps: Steps = EPOCH
    """M: optimiser steps of the surrogate a round, or `epoch`."""
    pgd_steps: int = 5
    """T: sign-gradient steps on each batch of the noise phase."""


@dataclass(frozen=True)
class TrainedSurrogateConfig(OptimisedConfig):
    """A poison that is made at once, when its surrogate has been trained on clean images."""

    init: ClassVar[str] = ZERO
    reads_labels: ClassVar[bool] = True
    """Whether the surrogate is a classifier."""

    def alternation(self) -> AlternationConfig:
        """Return one round: a surrogate trained to its end on clean images, then T steps."""
        shared = {field.name: getattr(self, field.name) for field in fields(OptimisedConfig)}
        return AlternationConfig(rounds=1, init=self.init, **shared)


@dataclass(frozen=True)
class TapConfig(TrainedSurrogateConfig):
    """Adversarial poisoning (Fowl et al., "Adversarial Examples Make Strong Poisons", 2021)."""

    pgd_steps: int = 250
    """T: sign-gradient steps on every image, on the trained surrogate."""
    targeted: bool = True
    """Towards the next class (the paper's stronger attack) instead of away from the image's own."""


@dataclass(frozen=True)
class AapConfig(TapConfig):
    """Augmented adversarial poisoning (Wang et al., NeurIPS 2024): `tap` in small steps.

    Its surrogate is trained for few epochs under weak contrastive augmentations, which the group
    file gives.
    """

    step_size: float = 0.01
    """Length of one sign-gradient step, in units of eps."""


@dataclass(frozen=True)
class SepConfig(TapConfig):
    """Self-ensemble protection (Chen et al., ICLR 2023): `tap` on checkpoints of one training.

    Images are moved towards the class half the number of classes on.
    """

    pgd_steps: int = 30
    """T: sign-gradient steps on every image, each on all checkpoints."""
    checkpoints: int = 30
    """Checkpoints, evenly spread over the optimiser steps of the surrogate, its last one among
    them."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        super().__post_init__()
        at_least_one("checkpoints", self.checkpoints)


@dataclass(frozen=True)
class TueConfig(CraftConfig):
    """Transferable unlearnable examples (Ren et al., ICLR 2023): deltas of a class lie together.

    A noise phase minimises the surrogate's self-supervised loss and, weighted, the class-wise
    separability discriminant of the deltas of the batch, which reads labels.
    """

    separability: float = 1.0
    """Weight of the discriminant beside the loss."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range, or there is no noise phase.
        """
        super().__post_init__()
        check_positive("separability", self.separability)
        if self.joint:
            raise UserError(
                "poison.schedule=joint has no noise phase, in which tue tells the classes of delta "
                "apart; use poison.schedule=alternate."
            )


@dataclass(frozen=True)
class PilConfig(TrainedSurrogateConfig):
    """Perturbation-induced linearization (Liu, Chen, Zhang, ICLR 2026) of a linear surrogate.

    With f a classifier and -delta the shortcut, what is minimised is
    shortcut CE(f(-delta), y) + (1 - shortcut) KL(uniform, f(x + delta)).
    """

    init: ClassVar[str] = RANDOM
    pgd_steps: int = 30
    """T: sign-gradient steps on every image, on the trained classifier."""
    shortcut: float = 0.9
    """Weight, in (0, 1), of the label being read off the perturbation alone; the rest is that of
    the image telling nothing."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        super().__post_init__()
        if not 0 < self.shortcut < 1:
            raise UserError(f"poison.shortcut must be in (0, 1), got {self.shortcut}.")


@dataclass(frozen=True)
class UnlearnableClustersConfig(TrainedSurrogateConfig):
    """Unlearnable clusters (Zhang et al., CVPR 2023): a delta a cluster, towards a wrong one.

    K-means on the features of a surrogate that was trained on clean images, by any method, groups
    these; the delta of each group moves its images to the centre of the next group.
    """

    reads_labels: ClassVar[bool] = False
    eps: float = 16 / 255
    """Largest change of a pixel, in [0, 1]."""
    clusters: int = 10
    """Groups of like images, each with a delta of its own."""
    epochs: int = 50
    """Passes over all images by which delta is made."""
    pgd_steps: int = 1
    """T: sign-gradient steps on each batch of these passes."""
    step_size: float = 0.02
    """Length of one sign-gradient step, in units of eps."""
    dtype: RowType = "float32"
    """Of the stored rows."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        super().__post_init__()
        at_least_one("epochs", self.epochs)
        self.alternation()  # which checks the number of clusters

    def alternation(self) -> AlternationConfig:
        """Return one round with a delta a cluster; see `TrainedSurrogateConfig`."""
        shared = {field.name: getattr(self, field.name) for field in fields(OptimisedConfig)}
        return CraftConfig(
            rounds=1,
            granularity="cluster",
            clusters=self.clusters,
            init=self.init,
            dual_branch=False,
            **shared,
        )
