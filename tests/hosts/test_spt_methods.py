"""Methods of stable-pretraining against every promise of the adapter."""

from __future__ import annotations

import pytest
import torch

from tests.bench.readme import EXAMPLES, host_methods
from tests.support.lightly_suite import (
    Conformance,
    check_gradient,
    check_labels_stay_outside,
    check_momentum,
    check_untouched,
)
from tests.support.spt_modules import FORWARDS, METHODS, REFUSED

pytest.importorskip(
    "stable_pretraining", reason="stable-pretraining is not installed: pip install cp-plugin[spt]"
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]
every_method = pytest.mark.parametrize(
    "style",
    [*FORWARDS, *METHODS],
    ids=[f"forward-{style.name}" for style in FORWARDS] + [style.name for style in METHODS],
)


@every_method
def test_gradients(style, double_precision, monkeypatch):
    # Its losses go over to float32, in which finite differences are mostly rounding.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    case = Conformance(style)
    check_momentum(case)
    check_gradient(case)


@every_method
def test_a_noise_phase_leaves_no_trace(style):
    case = Conformance(style)
    check_labels_stay_outside(case)
    check_untouched(Conformance(style))


def test_no_forward_function_is_forgotten():
    forward = pytest.importorskip("stable_pretraining.forward")
    own = {
        name
        for name, value in vars(forward).items()
        if getattr(value, "__module__", "") == forward.__name__ and not name.startswith("_")
    }
    assert own == {style.name for style in FORWARDS} | set(REFUSED)


def test_the_readme_lists_what_is_served():
    listed = f"<!-- host-methods:begin -->\n{host_methods()}\n<!-- host-methods:end -->"
    assert listed in EXAMPLES.read_text(), "run python -m tests.bench.readme"
