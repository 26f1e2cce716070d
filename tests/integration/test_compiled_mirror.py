"""The mirror under `torch.compile`: one graph, the same views and gradients."""

import pytest
import torch

from cp_plugin.apps.hydra_app import compose
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.engine.settings import complete
from cp_plugin.mirror import mirror


# In double precision a processor takes the way that accelerators take, without Numba's kernels.
@pytest.mark.parametrize("augmentations", ["cifar_paper", "asymmetric"])
def test_a_compiled_mirror_is_one_graph_with_the_same_views_and_gradients(augmentations):
    torch.compiler.reset()
    pipeline = build_pipeline(complete(compose("simclr", [f"augmentations={augmentations}"])))
    twin = mirror(pipeline)
    images = torch.rand(6, 3, 32, 32, dtype=torch.float64)
    params = twin.sample(images, torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda x: twin.apply(x, params), fullgraph=True, backend="eager")
    found = []
    for apply in (lambda x: twin.apply(x, params), compiled):
        x = images.clone().requires_grad_()
        views = apply(x)
        (gradient,) = torch.autograd.grad(sum((view**2).sum() for view in views), x)
        found.append((*views, gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-9, rtol=1e-9)
