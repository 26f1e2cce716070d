"""Whether gradients see every path from the views through the momentum branch to the loss.

Graphs show paths that are there, not those that the loss takes past them (`.data`, numpy). So the
numbers are changed a little, what the loss does is measured, and the gradient must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.gradients import MomentumGradients, preserve_state
from cp_plugin.hosts.lineage import dependent_in, graph_below
from cp_plugin.hosts.modes import hold_still
from cp_plugin.hosts.protocol import LossRequest, LossRequests
from cp_plugin.util.internals import tree_map, without_torch_functions

CALLS = 8
"""Calls of a network in one step that are looked at one by one; all further ones together."""


@dataclass
class Use:
    """What `following` finds."""

    only_picks: bool = False
    """Whether the loss uses the momentum branch only to pick indices, which have no gradient."""


def following(
    method: str,
    gradients_of: Callable[[], MomentumGradients],
    networks: Mapping[str, nn.Module],
    views: Sequence[Tensor],
    batch: Batch,
    found: Use,
) -> LossRequests:
    """Check that the gradient sees all by which the views reach the loss by the momentum branch.

    What each network returns is changed a little. Where the loss then changes, it uses the output,
    and its gradient with respect to the change must say by how much; where it does not change at
    all, the output only picks indices (SMoG's groups, neighbours) or is not used. Of networks whose
    output is used, what they are given is changed then: the way through them must be open too, in
    every call of them.

    Args:
        method: its name, for errors.
        gradients_of: makes the context that the noise phase uses.
        networks: the momentum branch by name.
        views: V views, each float (B, C, h, w).
        batch: what they were made of.
        found: what is filled in.

    Raises:
        UserError: the loss uses an output by a way that carries no gradient, or only a part of it.
    """
    picks = []
    for name, network in networks.items():
        slope = _Probe(0.0, asks=True)
        yield from _nudged(gradients_of(), network, views, batch, slope)
        if not slope.ran:
            continue
        small = _Difference(max(1e-3, 4 * slope.resolution))
        yield from small.measured(gradients_of, network, views, batch)
        used = not small.equals(slope)
        if used and slope.slopes is None and slope.resolution < 1e-5:
            # A choice may have flipped: a change ten times smaller then leaves it alone.
            smaller = _Difference(1e-4)
            yield from smaller.measured(gradients_of, network, views, batch)
            used = not smaller.equals(slope)
        picks.append(not (used or slope.reaches))
        if used:
            wide, narrow = _Difference(0.03), _Difference(0.015)
            for difference in (wide, narrow):
                yield from difference.measured(gradients_of, network, views, batch)
            _check_followed(method, name, slope, (wide, narrow))
            yield from _inside(method, gradients_of, name, network, views, batch)
    found.only_picks = bool(picks) and all(picks)


def _inside(
    method: str,
    gradients_of: Callable[[], MomentumGradients],
    name: str,
    network: nn.Module,
    views: Sequence[Tensor],
    batch: Batch,
) -> LossRequests:
    """Check the way through a network whose output the loss uses."""
    slope = _Probe(0.0, asks=True, of_inputs=True)
    yield from _nudged(gradients_of(), network, views, batch, slope)
    for call in range(min(slope.calls, CALLS)):
        wide, narrow = (_Difference(step, of_inputs=True, call=call) for step in (0.03, 0.015))
        for difference in (wide, narrow):
            yield from difference.measured(gradients_of, network, views, batch)
        _check_followed(method, name, slope, (wide, narrow), call)


@dataclass
class _Probe:
    """One run with a network's outputs, or its inputs, x taken as x * (1 + step * pattern)."""

    step: float
    asks: bool = False
    """Whether the derivative with respect to the step is asked for."""
    of_inputs: bool = False
    """Whether the inputs are changed, and not the outputs."""
    call: int = 0
    """Which call's inputs are changed; outputs are those of all calls."""
    calls: int = 0
    """How often the network was given something that depends on the views."""
    ran: bool = False
    reaches: bool = False
    """Whether a gradient path leads from the loss to any part of the branch."""
    loss: float = 0.0
    slopes: list[float] | None = None
    """The derivative, for inputs that of each call; None where no path to the loss is known."""
    resolution: float = 1e-7
    """Of the outputs' type."""


class _Difference:
    """The loss at two steps of opposite sign."""

    def __init__(self, step: float, of_inputs: bool = False, call: int = 0) -> None:
        self._step = step
        self._probes = [_Probe(sign * step, of_inputs=of_inputs, call=call) for sign in (1, -1)]

    def measured(
        self,
        gradients_of: Callable[[], MomentumGradients],
        network: nn.Module,
        views: Sequence[Tensor],
        batch: Batch,
    ) -> LossRequests:
        """Ask for both losses."""
        for probe in self._probes:
            yield from _nudged(gradients_of(), network, views, batch, probe)

    def equals(self, other: _Probe) -> bool:
        """Whether both losses are another run's to the last bit."""
        return all(probe.loss == other.loss for probe in self._probes)

    @property
    def slope(self) -> float:
        """The derivative by differences."""
        return (self._probes[0].loss - self._probes[1].loss) / (2 * self._step)

    def bend(self, here: float) -> float:
        """Half of what the derivatives to either side differ by; `here` is the loss between."""
        return abs(sum(probe.loss for probe in self._probes) - 2 * here) / (2 * self._step)

    def noise(self, resolution: float) -> float:
        """How far the slope may be off because losses are rounded."""
        return 16 * resolution * abs(self._probes[0].loss) / self._step


def _check_followed(
    method: str,
    name: str,
    asked: _Probe,
    differences: tuple[_Difference, _Difference],
    call: int = 0,
) -> None:
    known = (asked.slopes or [0.0] * CALLS)[call]
    measured = [difference.slope for difference in differences]
    noise = max(difference.noise(asked.resolution) for difference in differences)
    misses = [abs(slope - known) for slope in measured]
    limit = 0.25 * max(abs(known), *map(abs, measured)) + noise
    agree = abs(measured[0] - measured[1]) < 0.3 * min(misses)
    # Across a kink (a singular value that is nearly zero) differences say nothing of the gradient
    # on one side: a miss counts where the loss bends less than that.
    bends = [difference.bend(asked.loss) for difference in differences]
    agree &= all(bend < miss for bend, miss in zip(bends, misses, strict=True))
    cut = asked.slopes is None or not asked.reaches  # behind the network, or before it
    if (cut and max(map(abs, measured)) > noise) or (agree and min(misses) > limit):
        share = "no" if cut or known == 0 else "only a part of the"
        way = (
            f"passes its call {call + 1}: inside it is"
            if asked.of_inputs
            else ("reaches it: the way there has")
        )
        raise UserError(
            f"the loss of {method} uses what {name} returns, but {share} gradient {way} something "
            "that cannot be followed (.data, numpy, torch.inference_mode, an autograd.Function, a "
            "reentrant checkpoint or vmap under torch.no_grad). Compute the targets with plain "
            "torch functions under torch.no_grad or .detach(), or set poison.dual_branch=false."
        )


class _OutputNudge:
    """Changes what a network returns."""

    def __init__(self, probe: _Probe, steps: Tensor) -> None:
        self._probe, self._steps = probe, steps
        self._call = 0

    def inputs(self, arguments: Any) -> Any:
        """Return the arguments as they are."""
        return arguments

    def outputs(self, output: Any) -> Any:
        """Return the output, its numbers changed by the step."""
        return tree_map(self.changed, output)

    def changed(self, value: Any) -> Any:
        """Return a tensor of numbers changed by the step, anything else as it is."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
            return value
        probe = self._probe
        probe.ran = True
        probe.resolution = max(probe.resolution, torch.finfo(value.dtype).eps)
        if value.is_inference() and not torch.is_inference_mode_enabled():
            value = value.clone()
        if isinstance(value, nn.Parameter):  # an operation on weights alone is not opened
            value = value.detach()
        place = torch.arange(value.shape[-1], device=value.device)
        return value * (1 + self._steps[self._call] * place.cos()).to(value.dtype)


class _InputNudge(_OutputNudge):
    """Changes what a network is given of the views, in each call by a step of its own."""

    def inputs(self, arguments: Any) -> Any:
        """Return the arguments, those that depend on the views changed by the step."""
        dependent = {id(tensor) for tensor in dependent_in(arguments)}
        if not dependent:
            return arguments
        self._call = min(self._probe.calls, CALLS - 1)
        self._probe.calls += 1
        return tree_map(lambda v: self.changed(v) if id(v) in dependent else v, arguments)

    def outputs(self, output: Any) -> Any:
        """Return the output as it is."""
        return output


def _nudged(
    gradients: MomentumGradients,
    network: nn.Module,
    views: Sequence[Tensor],
    batch: Batch,
    probe: _Probe,
) -> LossRequests:
    given = [0.0] * (CALLS if probe.of_inputs else 1)
    given[probe.call] = probe.step
    steps = torch.tensor(given, device=views[0].device, requires_grad=probe.asks)

    def on_loss(loss: Tensor, weight: Tensor | None = None, retain_graph: bool = False) -> None:
        with without_torch_functions():
            probe.loss += float(loss.detach().double().sum())
        probe.reaches |= bool(gradients.lineage.momentum & graph_below([loss]))
        if probe.asks and loss.requires_grad:
            (part,) = torch.autograd.grad(
                loss, steps, torch.ones_like(loss), retain_graph=retain_graph, allow_unused=True
            )
            if part is not None:
                before = probe.slopes or [0.0] * len(part)
                probe.slopes = [a + b for a, b in zip(before, part.tolist(), strict=True)]

    with preserve_state(gradients.module), torch.enable_grad():
        hold_still(gradients.module)
        nudge = _InputNudge if probe.of_inputs else _OutputNudge
        gradients.nudges[id(network)] = nudge(probe, steps)
        with gradients:
            yield LossRequest(
                [view.detach().requires_grad_().clone() for view in views], batch, on_loss
            )
