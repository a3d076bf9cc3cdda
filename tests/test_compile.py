"""The result compiles without a graph break, for any batch size, and exports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.cat import CAT

SETTINGS = {
    "no cat": {"cat": False},
    "cat folded": {"cat": 1},
    "cat appended": {"cat": 3},
    "symmetric": {"cat": False, "recipe": fxquant.Recipe.FAST.replace(weight_symmetric=True, activation_symmetric=True)},
    "float activations": {"cat": False, "a": None},
    "float edges": {"cat": False, "edges": "float"},
}


@pytest.fixture(params=SETTINGS)
def quantized(request, net, images) -> torch.fx.GraphModule:
    settings = dict(SETTINGS[request.param])
    clusters = settings.pop("cat")
    result = fxquant.quantize(net, images, **{"cat": False, "recipe": "fast", "progress": False, **settings})
    if clusters:
        result = fxquant.append_cat(result, net, images, fit="kl", clusters=clusters, progress=False)
        assert isinstance(result, torch.fx.GraphModule)
        assert sum(isinstance(module, CAT) for module in result.modules()) == (clusters > 1)
    return result


class Counter:
    """A compiler that runs the graph as it is, and counts the graphs it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        self.graphs += 1
        return graph.forward


def test_at_most_two_graphs_for_all_batch_sizes(quantized, images):
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(quantized, fullgraph=True, backend=counter)
    for count in (1, 2, 3, 4, 5):  # torch makes one graph for a batch of one image, and one for more
        assert torch.equal(compiled(images[0][:count]), quantized(images[0][:count]))
    assert 1 <= counter.graphs <= 2


def test_a_third_graph_of_float_convolutions(net, images):
    """torch's own choice of kernel, for a convolution without stride on the CPU, depends on whether there are 16 images."""
    torch._dynamo.reset()
    counter = Counter()
    quantized = fxquant.quantize(net, images, cat=False, recipe="fast", progress=False)
    compiled = torch.compile(quantized, fullgraph=True, backend=counter)
    for count in (1, 2, 15, 16, 33, 64):
        x = torch.cat(images)[:1].expand(count, -1, -1, -1)
        assert torch.equal(compiled(x), quantized(x))
    assert counter.graphs == 3


def test_aot_eager(quantized, images):
    torch._dynamo.reset()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    for count in (4, 1, 5):
        assert torch.allclose(compiled(images[0][:count]), quantized(images[0][:count]), atol=1e-4)


def test_export_with_any_batch_size(quantized, images):
    exported = torch.export.export(quantized, (images[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    for count in (1, 2, 5):
        assert torch.equal(exported(images[0][:count]), quantized(images[0][:count]))


def test_inductor(net, images):
    torch._dynamo.reset()
    quantized = fxquant.quantize(net, images, cat=False, recipe="fast", progress=False)
    quantized = fxquant.append_cat(quantized, net, images, fit="kl", clusters=2, progress=False)
    compiled = torch.compile(quantized, fullgraph=True)
    # Fused arithmetic may move a value across a rounding threshold, which a 2-bit network feels: most outputs agree closely.
    close = torch.isclose(compiled(images[0]), quantized(images[0]), atol=1e-3).all(1)
    assert close.float().mean() >= 0.9
