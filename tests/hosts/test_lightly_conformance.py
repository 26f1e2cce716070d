"""Every module style against every promise of the adapter."""

import lightning.pytorch
import pytest
import pytorch_lightning

from cp_plugin.config.settings import UserError
from tests.support.lightly_masked_modules import MASKED
from tests.support.lightly_modules import MODULES, Style
from tests.support.lightly_odd_modules import ODD, InferenceTeacher
from tests.support.lightly_suite import (
    Conformance,
    check_gradient,
    check_labels_stay_outside,
    check_momentum,
    check_untouched,
)

# Lightly's DINO head still calls torch's older weight_norm.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


every_module = pytest.mark.parametrize(
    "style", [*MODULES, *ODD, *MASKED], ids=lambda style: style.name
)


@every_module
def test_gradients(style, double_precision):
    case = Conformance(style)
    check_momentum(case)
    check_gradient(case)


@every_module
def test_labels_stay_outside(style):
    check_labels_stay_outside(Conformance(style, pytorch_lightning))


@every_module
def test_a_noise_phase_leaves_no_trace(style):
    check_untouched(Conformance(style, lightning.pytorch))


def test_a_teacher_in_inference_mode_is_refused(double_precision):
    style = Style("cut", InferenceTeacher(), momentum=("teacher",))
    with pytest.raises(UserError, match="inference_mode"):
        Conformance(style).gradient()
