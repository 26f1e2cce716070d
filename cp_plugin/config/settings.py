"""Settings of a poison and of the monitor: frozen, checked where they are made, one unit each.

The names are those of the YAML group `poison`, of the keyword arguments of `CraftPoison` and of the
metadata in a poison file. Pixels live in [0, 1].
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args, get_type_hints

Granularity = Literal["sample", "class"]
Sharing = Literal["sample", "class", "cluster"]
RowType = Literal["float32", "float16", "int8"]
EPOCH: Literal["epoch"] = "epoch"
Steps = int | Literal["epoch"]
Order = Literal["alternate", "joint"]
Index = Literal["flat", "ivf"]
DuringNoise = Literal["frozen", "running"]
Fit = Literal["crop", "cover"]
CacheMode = Literal["auto", "true", "false"]
SURVIVE = ("jpeg", "resize")
RANDOM, ZERO = "random", "zero"
"""Where a perturbation starts, if not from a poison file."""


class UserError(ValueError):
    """A mistake that the user can mend: what was expected, what came, what to do.

    Command lines print its text alone and exit with code 2; libraries see an ordinary ValueError.
    """


T = TypeVar("T")


@dataclass(frozen=True)
class OptimisedConfig:
    """What every poison has that is optimised by sign-gradient steps."""

    eps: float = 8 / 255
    """Largest change of a pixel, in [0, 1]; `"8/255"` is understood."""
    pgd_steps: int = 5
    """T: sign-gradient steps on each batch."""
    step_size: float = 0.1
    """Length of one sign-gradient step, in units of eps."""
    image_size: int | None = None
    """Side of delta in pixels; images of other sizes are resized and centre-cropped first.
    None: the images' own size, where they have one (see `cp_plugin.data.canonical`)."""
    fit: Fit = "crop"
    """`crop`: images are brought to delta's size; `cover`: delta lies on a grid over each whole
    image and is brought to the image's own size (see `cp_plugin.data.fit`)."""
    dtype: RowType = "float16"
    """How rows are stored."""
    fraction: float = 1.0
    """Part of the images that is poisoned, class-balanced where there are labels."""
    seed: int | None = None
    """None: the run's seed."""
    dir: str | None = None
    """Where `poison.safetensors` goes. None: the run's folder."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        check_eps(self.eps)
        at_least_one("pgd_steps", self.pgd_steps)
        check_step_size(self.step_size)
        check_image_size(self.image_size)
        check_fit(self.fit)
        one_of("dtype", self.dtype, get_args(RowType))
        check_fraction(self.fraction)


@dataclass(frozen=True)
class AlternationConfig(OptimisedConfig):
    """A poison and its surrogate made in turns: M steps of the model, then N batches of noise."""

    granularity: Sharing = "sample"
    """`sample`: one delta an image; `class`: one delta a class (needs labels); `cluster`: one delta
    for each group of like images (needs none)."""
    rounds: int = 200
    """Alternations of model and noise phase; the host's epochs may end them sooner."""
    restarts: int = 0
    """How often the perturbation is handed on to a new surrogate, which has the first one's initial
    weights, an optimizer of its own and `rounds` rounds of its own. The host's epochs hold for each
    surrogate."""
    model_steps: Steps = EPOCH
    """M: optimiser steps of the surrogate a round, or `epoch`."""
    noise_steps: Steps = EPOCH
    """N: batches on which delta is optimised a round, or `epoch`; T steps on each."""
    init: str = RANDOM
    """`random` (uniform in [-eps, eps]), `zero`, or the path of a poison file to start from."""
    survive: tuple[str, ...] = ()
    """What delta is crafted through before the augmentation, so that it lasts: `jpeg`, `resize`."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        super().__post_init__()
        one_of("granularity", self.granularity, self.sharings)
        at_least_one("rounds", self.rounds)
        for name in ("model_steps", "noise_steps"):
            if getattr(self, name) != EPOCH:
                at_least_one(name, getattr(self, name), " or `epoch`")
        if not isinstance(self.restarts, int) or self.restarts < 0:
            raise UserError(f"poison.restarts must be 0 or more, got {self.restarts!r}.")
        for name in self.survive:
            one_of("survive", name, SURVIVE)

    @property
    def sharings(self) -> tuple[str, ...]:
        """What `granularity` may be."""
        return get_args(Granularity)

    @property
    def joint(self) -> bool:
        """Whether one backward pass serves the surrogate and the perturbation."""
        return False

    @property
    def uses_dual_branch(self) -> bool:
        """Whether gradients reach delta through a momentum branch."""
        return False

    @property
    def runs_momentum(self) -> bool:
        """Whether queue and momentum branch go on during a noise phase."""
        return False


@dataclass(frozen=True)
class CraftConfig(AlternationConfig):
    """How a contrastive poison is crafted (He, Zha, Katabi, ICLR 2023, section 3 and appendix).

    Granularity `sample` is CP-S, `class` is CP-C. `cluster` is CP-C without labels: for the first
    fifth of its training the surrogate sees clean images, which k-means on its features then puts
    into groups; each shares a delta from there on.
    """

    clusters: int = 10
    """Groups of granularity `cluster`."""
    schedule: Order = "alternate"
    """`alternate`: M steps of the model, then N batches of noise, as in the paper; `joint`: the
    backward pass of each step of the model moves delta too, and there is no noise phase."""
    dual_branch: bool = True
    """Let gradients reach delta through the momentum branch too; no effect without one."""
    momentum_modules: str | tuple[str, ...] = "auto"
    """Names of the momentum branch's modules, or `auto`."""
    momentum_during_noise: DuringNoise = "frozen"
    """`frozen`: a noise phase leaves queue and momentum branch as they are, so that they hold what
    model steps made of training-mode images, and the surrogate does not depend on N and T;
    `running`: each noise step pushes its keys and makes an EMA step, as in the released code."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        super().__post_init__()
        one_of("schedule", self.schedule, get_args(Order))
        if not isinstance(self.clusters, int) or self.clusters < 2:
            raise UserError(f"poison.clusters must be 2 or more, got {self.clusters!r}.")
        if self.granularity == "cluster" and self.init not in (RANDOM, ZERO):
            raise UserError(
                "poison.granularity=cluster begins before there are clusters, so it cannot take "
                f"over the rows of {self.init}; leave poison.init out, or craft one delta an "
                "image (poison.granularity=sample), which can start from any poison."
            )
        one_of("momentum_during_noise", self.momentum_during_noise, get_args(DuringNoise))

    @property
    def sharings(self) -> tuple[str, ...]:
        """What `granularity` may be."""
        return get_args(Sharing)

    @property
    def joint(self) -> bool:
        """Whether one backward pass serves the surrogate and the perturbation."""
        return self.schedule == "joint"

    @property
    def uses_dual_branch(self) -> bool:
        """Whether gradients reach delta through a momentum branch."""
        return self.dual_branch

    @property
    def runs_momentum(self) -> bool:
        """Whether queue and momentum branch go on during a noise phase."""
        return self.momentum_during_noise == "running"


@dataclass(frozen=True)
class CleanConfig:
    """No poison: the clean baseline of a comparison."""

    image_size: int | None = None
    """As that of the poison it is compared with, where that was set."""
    fit: Fit = "crop"
    """As that of the poison it is compared with."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        check_image_size(self.image_size)
        check_fit(self.fit)


@dataclass(frozen=True)
class InjectConfig:
    """A poison file added to the training images as they are loaded."""

    path: str
    """The `.safetensors` file."""
    fraction: float = 1.0
    """Part of the poisoned images that stays so, the same part of each class; by key, so that the
    choice is the same everywhere."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        check_fraction(self.fraction)


@dataclass(frozen=True)
class MonitorConfig:
    """kNN on frozen features while a model trains (Wu et al., CVPR 2018)."""

    every_n_epochs: int = 10
    """Epochs between two evaluations; the last epoch is always evaluated."""
    k: int | None = None
    """Neighbours. None: 200, or 20 where the bank has fewer than 5,000 images."""
    temperature: float = 0.07
    """Votes weigh exp(cosine / temperature)."""
    index: Index = "flat"
    """`flat`: exact; `ivf`: approximate, for banks so large that the search takes long."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of its range.
        """
        at_least_one("every_n_epochs", self.every_n_epochs, prefix="monitor")
        if self.k is not None:
            at_least_one("k", self.k, prefix="monitor")
        if self.temperature <= 0:
            raise UserError(f"monitor.temperature must be positive, got {self.temperature}.")
        one_of("index", self.index, get_args(Index), "monitor")


def build(config_class: type[T], values: Mapping[str, Any], group: str = "poison") -> T:
    """Make a settings object from plain values, as YAML or the command line give them.

    Args:
        config_class: one of the dataclasses of this module.
        values: keys and values; strings such as `"8/255"` or `"1e-2"` stand for numbers.
        group: the name that errors give to the keys.

    Returns:
        The checked object.

    Raises:
        UserError: an unknown key (the nearest known one is named), a missing one, a value of the
            wrong type or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    hints = get_type_hints(config_class)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = (
                f"did you mean {group}.{near[0]}?" if near else f"known keys: {', '.join(fields)}."
            )
            raise UserError(f"{group}.{key} is not a setting; {hint}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and values.get(name) in (None, "???"):
            raise UserError(f"{group}.{name} is missing; add {group}.{name}=…")
    return config_class(
        **{key: _convert(f"{group}.{key}", value, hints[key]) for key, value in values.items()}
    )


def given(
    config_class: type[T], config: T | None, values: Mapping[str, Any], group: str = "poison"
) -> T:
    """Return settings that come as an object, or else as keywords.

    Args:
        config_class: what they must be.
        config: the object; None: there are keywords.
        values: the keywords, see `build`.
        group: the name that errors give to the keys.

    Raises:
        UserError: settings of another kind, or given twice; or as `build` says.
    """
    if config is None:
        return build(config_class, values, group)
    if not isinstance(config, config_class):
        raise UserError(
            f"expected a {config_class.__name__}, got {type(config).__name__}; give one, or the "
            "settings as keywords."
        )
    if values:
        raise UserError(
            f"{group}.{next(iter(values))} is given beside a {config_class.__name__}; give either "
            "the object or keywords."
        )
    return config


def check_eps(eps: float) -> float:
    """Return eps if it is a budget.

    Raises:
        UserError: eps is not in (0, 1], or too small to survive rounding to 8 bit.
    """
    if not isinstance(eps, (int, float)) or not math.isfinite(eps) or not 1 / 255 <= eps <= 1:
        raise UserError(
            f"poison.eps must lie in [1/255, 1], since pixels are in [0, 1] and images have 8 bit; "
            f"got {eps}. The paper uses 8/255."
        )
    return eps


def check_image_size(image_size: int | None) -> None:
    """Check the side of canonical images.

    Raises:
        UserError: it is out of range.
    """
    if image_size is not None and not 8 <= image_size <= 512:
        raise UserError(f"poison.image_size must be between 8 and 512 pixels, got {image_size}.")


def check_fit(fit: str) -> None:
    """Check how delta and images come together.

    Raises:
        UserError: it is no known way.
    """
    one_of("fit", fit, get_args(Fit))


def check_fraction(fraction: float) -> None:
    """Check a part of the images.

    Raises:
        UserError: it is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"poison.fraction must be in (0, 1], got {fraction}.")


def check_positive(name: str, value: float) -> None:
    """Check a weight.

    Raises:
        UserError: it is not positive and finite.
    """
    if not 0 < value < math.inf:
        raise UserError(f"poison.{name} must be positive; got {value}.")


def check_step_size(step_size: float) -> None:
    """Check the length of a sign-gradient step.

    Raises:
        UserError: it is not in (0, 2].
    """
    if not 0 < step_size <= 2:
        raise UserError(
            f"poison.step_size is in units of eps, in (0, 2]; got {step_size}. The paper uses 0.1."
        )


def cache_mode(value: Any) -> CacheMode:
    """Return `data.cache` as it is written in YAML, on a command line or in Python.

    Raises:
        UserError: it is none of auto, true and false.
    """
    text = str(value).lower()
    for mode in ("auto", "true", "false"):
        if text == mode:
            return mode
    raise UserError(f"data.cache must be auto, true or false; got {value!r}.")


def eps_levels(eps: float, full_scale: int = 255) -> int:
    """Return the budget in levels: the largest whole number that is at most full_scale * eps."""
    return math.floor(full_scale * eps + 1e-6)


def number(text: str) -> float:
    """Return the number that a string such as `"8/255"`, `"0.03"` or `"1e-2"` stands for.

    Raises:
        ValueError: it stands for none.
    """
    numerator, slash, denominator = text.partition("/")
    if not slash:
        return float(text)
    try:
        return float(Fraction(numerator.strip()) / Fraction(denominator.strip()))
    except ZeroDivisionError:
        raise ValueError(f"division by zero in {text!r}") from None


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Bring a YAML value to the type of its field."""
    kinds = set(get_args(hint)) or {hint}
    if value is None and type(None) in kinds:
        return None
    try:
        if isinstance(value, (list, tuple)) and str in kinds:
            return tuple(str(item) for item in value)
        if bool in kinds:
            if isinstance(value, bool):
                return value
            raise ValueError("not a truth value")
        if isinstance(value, bool):
            raise ValueError("a truth value")
        if float in kinds:
            return number(value) if isinstance(value, str) else float(value)
        if int in kinds and value != EPOCH:
            whole = number(value) if isinstance(value, str) else value
            if int(whole) != whole:
                raise ValueError("not a whole number")
            return int(whole)
    except (TypeError, ValueError):
        wanted = (
            "true or false" if bool in kinds else "a number" if float in kinds else "an integer"
        )
        raise UserError(f"{name} must be {wanted}, got {value!r}.") from None
    return value


def one_of(name: str, value: object, allowed: tuple[str, ...], prefix: str = "poison") -> None:
    """Refuse what is not among the allowed values."""
    if value not in allowed:
        raise UserError(f"{prefix}.{name} must be one of {', '.join(allowed)}; got {value!r}.")


def at_least_one(name: str, value: object, also: str = "", prefix: str = "poison") -> None:
    """Refuse what is no whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{prefix}.{name} must be an integer of at least 1{also}; got {value!r}.")
