"""Everything a user can get wrong: a message that says what to do, and a network that stays as it was."""

from __future__ import annotations

import importlib
import warnings
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant import passes
from fxquant.errors import listed
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.recipe import PRESETS


class Net(nn.Module):
    """A forward and the layers it uses."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module):
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def conv(inputs: int = 3, outputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def classifier(forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> Net:
    """A network with a stem `c`, a classifier `fc`, and whatever is between."""
    torch.manual_seed(0)
    return Net(forward, **{"c": conv(), "fc": nn.Linear(8, 10), **layers})


@pytest.fixture
def quantize(untouched):
    """`fxquant.quantize`, silent, that fails the test when it leaves a trace on the network or on the images."""

    def run(model: Any, loader: Any, *args: Any, **options: Any) -> torch.fx.GraphModule:
        tensors = [batch for batch in loader if isinstance(batch, Tensor)] if isinstance(loader, list) else []
        before = [tensor.clone() for tensor in tensors]
        try:
            with untouched(model if isinstance(model, nn.Module) else nn.Identity()):
                return fxquant.quantize(model, loader, *args, **{"progress": False, "cat": False, "recipe": "fast", **options})
        finally:
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, tensors, strict=True))

    return run


def check_runs(quantized: torch.fx.GraphModule, images: Tensor, classes: int = 10) -> None:
    out = quantized(images)
    assert out.shape == (len(images), classes)
    assert out.isfinite().all()


# The loader


def test_empty_loader(quantize, net):
    with pytest.raises(fxquant.CalibrationError, match=r"^calib_loader: yields no batch\. Check its data set"):
        quantize(net, [])


def test_exhausted_iterator(quantize, net, images):
    iterator = iter(images)
    list(iterator)
    with pytest.raises(fxquant.CalibrationError, match="an iterator that was read before is empty, so pass the DataLoader"):
        quantize(net, iterator)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, "is a NoneType, not an iterable of batches. Pass a DataLoader or a list of tensors."),
        (7, "is a int, not an iterable of batches"),
        (torch.zeros(2, 3, 8, 8), "is one tensor, not an iterable of batches. Write [images] for a single batch."),
    ],
)
def test_no_loader_at_all(quantize, net, loader, message):
    with pytest.raises(fxquant.CalibrationError) as caught:
        quantize(net, loader)
    assert str(caught.value).startswith("calib_loader: " + message)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3, 8, 8), "batch 1: has shape [3, 8, 8], expected [N, C, H, W]. Add the batch axis with images[None]."),
        (
            torch.zeros(16),
            "batch 1: has shape [16], expected [N, C, H, W]. Begin a batch with the images, not with the labels.",
        ),
        (
            (torch.zeros(16).long(), torch.zeros(16, 3, 8, 8)),
            "batch 1: has shape [16], expected [N, C, H, W]. Begin a batch with the images, not with the labels.",
        ),
        (torch.zeros(0, 3, 8, 8), "batch 1: has shape [0, 3, 8, 8], expected [N, C, H, W]. Yield at least one image a batch."),
        (torch.zeros(2, 3, 9, 9), "batch 1: has images of shape [3, 9, 9], batch 0 has [3, 8, 8]. Resize all images alike."),
        (torch.zeros(2, 3, 8, 8).byte(), "batch 1: has type uint8, expected float32. Scale to floats and normalize as in training."),
        (torch.zeros(2, 3, 8, 8).long(), "batch 1: has type int64, expected float32. Scale to floats and normalize as in training."),
        (torch.zeros(2, 3, 8, 8).half(), "batch 1: has type float16, expected float32. Convert with images.float()."),
        ([], "batch 1: is empty. Yield (images, ...) or images."),
        ("images", "batch 1: holds a str, not a tensor of images. Yield tensors [N, C, H, W]."),
        (None, "batch 1: holds a NoneType, not a tensor of images. Yield tensors [N, C, H, W]."),
        (torch.zeros(2, 3, 8, 8).numpy(), "batch 1: holds a ndarray, not a tensor of images. Yield tensors [N, C, H, W]."),
        ({"video": 1, "audio": 2}, "batch 1: is a dict with the keys 'video', 'audio'. Put the images under one of 'pixel_values', "),
    ],
)
def test_a_batch_that_holds_no_images(quantize, net, images, batch, message):
    with pytest.raises(fxquant.CalibrationError) as caught:
        quantize(net, [images[0], batch])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
def test_nan_and_inf_name_batch_and_image(quantize, net, images, value, word):
    images[2][5, 1, 3, 4] = value
    with pytest.raises(fxquant.CalibrationError, match=f"^batch 2: image 5 holds {word}. Drop or repair it; a std of 0 in Normalize"):
        quantize(net, images)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 8, 8)])
def test_other_channels_than_the_network_takes(quantize, net, shape):
    with pytest.raises(fxquant.CalibrationError, match=r"Residual fails on images of shape .*Pass images with the channels and the size"):
        quantize(net, [torch.zeros(shape)])


def test_other_size_than_the_network_takes(quantize):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval()
    with pytest.raises(fxquant.CalibrationError, match=r"Sequential fails on images of shape \[3, 9, 9\]"):
        quantize(network, [torch.zeros(2, 3, 9, 9)])


def test_other_size_than_the_graph_was_traced_for(quantize, net, images):
    traced = fxquant.trace(net, torch.zeros(1, 3, 16, 16))
    with pytest.raises(fxquant.CalibrationError, match=r"images of shape \[3, 8, 8\], the graph was traced for \[3, 16, 16\]. Call fxq"):
        quantize(traced, images)


class Features(UserDict):
    """Like the batches of Hugging Face's image processors: a mapping, not a dict."""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, "labels"],
        lambda x: {"labels": torch.zeros(len(x)), "pixel_values": x},
        lambda x: {"image": x},
        lambda x: Features(pixel_values=x, pixel_mask=torch.ones(len(x))),
        lambda x: ({"x": x}, 3),
    ],
    ids=["tuple", "list", "dict", "image key", "mapping", "tuple of a dict"],
)
def test_batches_in_other_wrappings(quantize, net, images, wrap):
    expected = quantize(net, images)(images[0])
    assert torch.equal(quantize(net, [wrap(batch) for batch in images])(images[0]), expected)


# Few images


@pytest.mark.parametrize("count", [1, 2, 5])
def test_too_few_images_to_choose_a_correction(quantize, net, images, count):
    with pytest.warns(fxquant.FxquantWarning, match=f"CAT skipped: {count} images are too few to cross-validate, 8 are enough. Pass more"):
        quantized = quantize(net, [images[0][:count]], cat=True)
    check_runs(quantized, images[0])
    assert "too few" in str(fxquant.report(quantized))


def test_fewer_images_than_clusters(quantize, net, images):
    with pytest.raises(fxquant.CATError, match=r"^cat: 10 images are fewer than 64 clusters\. Pass more images, or ask"):
        quantize(net, [images[0][:10]], cat="paper")
    quantized, teacher = quantize(net, images), net
    with pytest.raises(fxquant.CATError, match=r"^cat: 63 images are fewer than 64 clusters"):
        quantize(net, [torch.cat(images)[:63]], cat="paper")
    check_runs(quantize(net, images, cat="paper"), images[0])  # 64 images are enough
    with pytest.raises(fxquant.CATError, match=r"^cat: 16 images are fewer than 64 clusters"):
        fxquant.append_cat(quantized, teacher, images[:1], fit="moments", progress=False)


# The network


def test_train_mode(quantize, make_net, images):
    network = make_net()
    expected = quantize(network, images)(images[0])
    network.train()
    network.blocks[0].eval()  # a mixture must stay one too; `quantize` compares the flags of all submodules
    with pytest.warns(fxquant.FxquantWarning, match=r"Residual is in train mode; a copy in eval mode is traced. Call model.eval"):
        quantized = quantize(network, images)
    assert torch.equal(quantized(images[0]), expected)
    assert not any(module.training for module in quantized.modules())


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_other_precision_of_weights(quantize, images, dtype):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10).to(dtype)).eval()
    with pytest.raises(fxquant.ModelError, match=r"^1\.weight: is (float16|bfloat16); .* Pass model\.float\(\)\.$"):
        quantize(network, images)


def test_mixed_precision_of_weights(quantize, make_net, images):
    network = make_net()
    network.fc.double()
    with pytest.raises(fxquant.ModelError, match=r"mixes precisions: .*float32 and fc.bias float64\. Pass model\.float\(\)"):
        quantize(network, images)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights(quantize, make_net, images, value):
    network = make_net()
    network.fc.weight.data[3, 1] = value
    with pytest.raises(fxquant.ModelError, match=r"^fc.weight: holds NaN or Inf. Re-load the checkpoint\.$"):
        quantize(network, images)


def test_nan_statistics(quantize, make_net, images):
    network = make_net()
    network.bn1.running_var[2] = float("nan")
    with pytest.raises(fxquant.ModelError, match=r"^bn1.running_var: holds NaN or Inf"):
        quantize(network, images)


def test_nan_buffer(quantize, make_net, images):
    network = make_net()
    network.register_buffer("bound", torch.tensor([1.0, float("nan")]))
    with pytest.raises(fxquant.ModelError, match=r"^bound: holds NaN. Re-load the checkpoint\.$"):
        quantize(network, images)


@pytest.mark.parametrize("name", ["running_mean", "weight"])
def test_infinite_buffers_of_norms(quantize, make_net, images, name):
    network = make_net()
    if name == "weight":  # as in a frozen norm
        weight = network.bn1.weight.data
        del network.bn1.weight
        network.bn1.register_buffer("weight", weight)
    getattr(network.bn1, name)[2] = float("inf")
    with pytest.raises(fxquant.ModelError, match=rf"^bn1.{name}: holds NaN or Inf"):
        quantize(network, images)


def test_meta_device(quantize, net, images):
    with pytest.raises(fxquant.ModelError, match=r"conv1.weight: has no data \(meta device\). Load weights before quantizing"):
        quantize(net.to("meta"), images)


def test_lazy_layers(images):
    with pytest.raises(fxquant.ModelError, match=r"0\.weight: has no shape yet \(lazy\)\. Run one batch"):
        fxquant.quantize(nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()).eval(), images, progress=False)


def test_a_graph_of_torch_export(quantize, net, images):
    exported = torch.export.export(net, (images[0],)).module()
    with pytest.raises(fxquant.ModelError, match=r"is a graph of torch\.export.*Pass the nn\.Module that it was exported from"):
        quantize(exported, images)


def test_operations_of_aten_in_a_traced_network_are_no_export(quantize, images):
    network = classifier(lambda net, x: net.fc(pooled(torch.ops.aten.relu.default(net.c(x)))))
    check_runs(quantize(fxquant.trace(network, images[0]), images), images[0])


@pytest.mark.parametrize("drop", [lambda x: F.dropout(x, 0.5), lambda x: F.dropout2d(x[..., None], 0.5)[..., 0]], ids=["values", "maps"])
def test_a_network_that_draws_at_random(quantize, images, drop):
    network = classifier(lambda net, x: net.fc(drop(pooled(net.c(x)))))
    with pytest.raises(fxquant.TraceError, match=r"gives other outputs each time, in eval mode\. Let it draw nothing at random"):
        quantize(network, images)


@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor], ids=["parameter", "buffer"])
def test_complex_weights_stay_float(quantize, images, tmp_path, kind):
    """A filter of frequencies, as in networks that mix tokens by Fourier transforms."""

    class Frequencies(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)
            weight = torch.randn(8, 8, 5, dtype=torch.complex64)
            self.register_parameter("w", kind(weight)) if kind is nn.Parameter else self.register_buffer("w", weight)

        def forward(self, x):
            x = torch.relu(self.c(x))
            return self.fc(pooled(torch.fft.irfft2(torch.fft.rfft2(x) * self.w, s=x.shape[-2:])))

    torch.manual_seed(0)
    network = Frequencies().eval()
    quantized = quantize(network, images, w=8, a=8)
    torch.testing.assert_close(quantized(images[0]), network(images[0]), rtol=0.1, atol=0.1)
    fxquant.save(quantized, tmp_path / "network.safetensors")
    assert torch.equal(fxquant.load(tmp_path / "network.safetensors", Frequencies())(images[0]), quantized(images[0]))
    network.w.data[0, 0, 0] = complex(0, float("nan"))
    with pytest.raises(fxquant.ModelError, match=r"^w: holds NaN"):
        quantize(network, images)
    network.w.data = torch.ones_like(network.w, dtype=torch.complex128)
    with pytest.raises(fxquant.ModelError, match=r"^w: is complex128, which cannot be stored\. Make it complex64"):
        quantize(network, images)


@pytest.mark.parametrize("network", [None, "resnet18", lambda x: x, nn.Conv2d])
def test_no_module(quantize, images, network):
    with pytest.raises(fxquant.ModelError, match=r"^model: is a .*, not an nn.Module. Pass the network itself"):
        quantize(network, images)


def test_quantized_already(quantize, net, images):
    quantized = quantize(net, images)
    with pytest.raises(fxquant.ModelError, match=r"is quantized already. Pass the float network"):
        quantize(quantized, images)


def test_channel_of_zeros(quantize, make_net, images):
    network = make_net()
    network.conv1.weight.data[2] = 0
    network.fc.weight.data[3] = 0
    quantized = quantize(network, images)
    check_runs(quantized, images[0])
    assert quantized.fc.weight[3].eq(0).all()


@pytest.mark.parametrize(
    "between",
    [
        lambda net, x: net.c(x) * 0 + 2,
        lambda net, x: -F.relu(net.c(x)) - 1,
        lambda net, x: F.relu(net.c(x) - 1000),
        lambda net, x: net.c(x) * 0 - 3,
    ],
    ids=["constant", "all negative", "always zero", "negative constant"],
)
@pytest.mark.parametrize("method", ["lp", "minmax", "percentile", "kl"])
def test_degenerate_activations(quantize, images, between, method):
    network = classifier(lambda net, x: net.fc(pooled(net.c2(between(net, x)))), c2=conv(8, 8))
    quantized = quantize(network, images, 8, 8, recipe=fxquant.Recipe.FAST.replace(activation_range=method))
    check_runs(quantized, images[0])
    wanted, got = network(images[0]), quantized(images[0])
    assert (got - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_a_branch_that_nothing_reads(quantize, images):
    network = classifier(lambda net, x: (net.dead(x), net.fc(pooled(net.c(x))))[1], dead=conv(), unused=conv(8, 8))
    quantized = quantize(network, images)
    check_runs(quantized, images[0])
    assert [row.name for row in fxquant.report(quantized).record.layers] == ["c", "fc"]


def test_parameters_shared_between_two_layers(quantize, images):
    first, second = conv(8, 8), conv(8, 8)
    second.weight = first.weight
    network = classifier(lambda net, x: net.fc(pooled(net.c2(F.relu(net.c1(F.relu(net.c(x))))))), c1=first, c2=second)
    quantized = quantize(network, images, 8, 8)
    assert torch.allclose(quantized(images[0]), network(images[0]), atol=0.05)
    assert quantized.c1.weight.data_ptr() != quantized.c2.weight.data_ptr()
    assert "c2.weight: shared with c1.weight, now its own copy" in str(fxquant.report(quantized))


def test_the_same_module_called_twice(quantize, images):
    network = classifier(lambda net, x: net.fc(pooled(F.relu(net.c1(F.relu(net.c1(F.relu(net.c(x)))))))), c1=conv(8, 8))
    quantized = quantize(network, images, 8, 8)
    assert torch.allclose(quantized(images[0]), network(images[0]), atol=0.05)
    assert sum(isinstance(module, QuantizedLayer) for module in quantized.modules()) == 4
    assert "c1_1: second call of a shared module, now its own copy" in str(fxquant.report(quantized))


@pytest.mark.parametrize("network", [nn.ReLU(), nn.Identity(), nn.BatchNorm2d(3), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))], ids=repr)
def test_nothing_to_quantize(quantize, images, network):
    with pytest.raises(fxquant.ModelError, match="has no convolution or linear layer with stored weights, so there is nothing to quantize"):
        quantize(network.eval(), images)


class Counting(nn.Module):
    """Changes a buffer in eval mode, in one of several ways."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.fc = how, nn.Linear(192, 10)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.seen += 1
        elif self.how == "assigned":
            self.seen = 0.9 * self.seen + 0.1 * x.mean()
        elif self.how == "copied":
            self.seen.copy_(x.mean())
        elif self.how == "first":
            self.seen = torch.where(self.seen == 0, 1 / x.std(), self.seen)
        elif self.how == "maximum":
            self.seen = torch.maximum(self.seen, x.abs().max())
        elif self.how == "new":
            self.register_buffer("late", x.mean(), persistent=False)
        return self.fc(x.flatten(1)) + 0 * self.seen


@pytest.mark.parametrize("how", ["in place", "assigned", "copied", "first", "maximum", "new"])
def test_buffers_that_change_in_eval(quantize, images, how):
    with pytest.raises(
        fxquant.ModelError, match=r"^buffer (seen|late): changes during a forward pass in eval mode.*Let forward leave buff"
    ):
        quantize(Counting(how).eval(), images)


class Remembering(nn.Module):
    """Works out the distances between pixels when it first sees how many there are, as ConViT does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 10)
        self.register_buffer("distances", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.distances.shape[1] != x.shape[1]:
            self.distances = torch.arange(x.shape[1]).sub(96.0).div(96.0)[None]
        return self.fc(x * self.distances.expand(x.shape[0], -1))


def test_a_buffer_that_is_worked_out_once(quantize, images, tmp_path):
    network = Remembering().eval()
    quantized = quantize(network, images, 8, 8)
    assert network.distances.shape == (1, 1)
    assert torch.allclose(quantized(images[0]), network(images[0]), atol=0.05)
    fxquant.save(quantized, tmp_path / "network.safetensors")
    again = fxquant.load(tmp_path / "network.safetensors", Remembering())
    assert torch.equal(again(images[1]), quantized(images[1]))


def test_buffers_that_stay(quantize, images):
    check_runs(quantize(Counting("not").eval(), images), images[0])


def test_a_network_with_two_inputs(quantize, images):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 10)

        def forward(self, x, y):
            return self.fc((x + y).flatten(1))

    with pytest.raises(fxquant.TraceError, match="Wrap the model in a module whose forward takes one batch of images"):
        quantize(Two().eval(), images)


def test_a_network_that_cannot_be_traced(quantize, images):
    network = classifier(lambda net, x: net.fc(pooled(net.c(x))) if x.sum() > 0 else net.fc(pooled(-net.c(x))))
    with pytest.raises(fxquant.TraceError, match=r"test_bad_input\.py:\d+: Python control flow"):
        quantize(network, images)


# No logits


OUTPUTS = {
    "4-D": (lambda net, x: net.c(x), r"['N', 8, 8, 8], not logits"),
    "3-D": (lambda net, x: net.fc(net.c(x).flatten(2).transpose(1, 2)), "['N', 64, 10], not logits"),
    "tuple": (lambda net, x: (net.fc(pooled(net.c(x))), net.c(x)), "a tuple, not one tensor of logits"),
    "dict": (lambda net, x: {"logits": net.fc(pooled(net.c(x)))}, "dict, not one tensor of logits"),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_no_logits_to_correct(quantize, images, output):
    forward, reason = OUTPUTS[output]
    network = classifier(forward)
    with pytest.warns(fxquant.FxquantWarning, match=r"CAT skipped: the network returns .* Pass cat=False to silence this") as caught:
        quantized = quantize(network, images, cat=True)
    assert reason in str(caught[-1].message)
    assert reason in " ".join(str(fxquant.report(quantized)).split())
    assert type(quantized(images[0])) is type(network(images[0]))
    with pytest.raises(fxquant.CATError, match="Use cat=False, or wrap the network so that it returns logits"):
        quantize(network, images, cat="paper")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(network, images, cat=False)


# Arguments


@pytest.mark.parametrize("bits", [0, 1, 9, -2, 2.5, 4.0, True, "2", (2, 2)])
@pytest.mark.parametrize("name", ["w", "a"])
def test_bits_out_of_range(quantize, net, images, name, bits):
    with pytest.raises(fxquant.ConfigError) as caught:
        quantize(net, images, **{name: bits})
    assert str(caught.value) == f"{name}: {bits!r} bits are not supported. Use a whole number from 2 to 8, or None for float."


def test_nothing_asked_for(quantize, net, images):
    with pytest.raises(fxquant.ConfigError, match=r"w and a are both None, so there is nothing to quantize. Give bits to one of them"):
        quantize(net, images, None, None)


def test_two_layers_with_float_edges_leave_nothing(quantize, images):
    with pytest.raises(fxquant.ConfigError, match=r"^edges and overrides: leave every weight and activation float\. Give bits to one"):
        quantize(classifier(lambda self, x: self.fc(pooled(self.c(x)))), images, edges="float")


def test_float_weights_or_float_activations(quantize, net, images):
    only_a, only_w = quantize(net, images, None, 4), quantize(net, images, 4, None)
    assert not any(isinstance(module, QuantizedLayer) for module in only_a.modules())
    assert any(isinstance(module, UniformQuantizer) for module in only_a.modules())
    assert not hasattr(only_w, "activations")
    assert all(isinstance(module, QuantizedLayer) for module in only_w.modules() if isinstance(module, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "fsat"}, f"recipe: 'fsat' is not known. Use one of {listed(PRESETS)}; did you mean 'fast'?"),
        ({"recipe": {}}, f"recipe: {{}} is not known. Use one of {listed(PRESETS)}."),
        ({"edges": "8bits"}, "edges: '8bits' is no rule. Use one of '8bit', 'brecq', 'same', 'float', 'integer'; did you mean '8bit'?"),
        ({"edges": 8}, "edges: 8 is no rule. Use one of '8bit', 'brecq', 'same', 'float'"),
        ({"cat": "papr"}, "cat: 'papr' is no setting. Use True, False or 'paper'."),
        ({"edges": ["8bit"]}, "edges: ['8bit'] is no rule. Use one of '8bit', 'brecq', 'same', 'float'"),
        ({"cat": torch.tensor(1)}, "cat: tensor(1) is no setting. Use True, False or 'paper'."),
        ({"cat": 1}, "cat: 1 is no setting. Use True, False or 'paper'."),
        ({"cat": None}, "cat: None is no setting. Use True, False or 'paper'."),
        ({"overrides": {"block.*": {"w": 4}}}, "overrides['block.*']: matches no layer. Did you mean 'blocks.*'"),
        ({"overrides": {"conv9": {"w": 4}}}, "overrides['conv9']: matches no layer. Did you mean 'conv1'"),
        ({"overrides": ["x"]}, 'overrides: is a list. Write a dict such as {"layer4.*": {"w": 4}}.'),
        (
            {"overrides": {"*": {"w": None, "a": None}}},
            "edges and overrides: leave every weight and activation float. Give bits to one layer at least.",
        ),
        ({"overrides": {"conv1": 4}}, "overrides['conv1']: 4 is not a dict with the keys 'w' and 'a'. Write for example {'w': 4, 'a': 8}."),
        ({"overrides": {"conv1": {"bits": 4}}}, "overrides['conv1']: {'bits': 4} is not a dict with the keys 'w' and 'a'."),
        ({"overrides": {"conv1": {"w": 1}}}, "overrides['conv1']['w']: 1 bits are not supported."),
        ({"seed": "a"}, "seed: 'a' is no seed. Use a whole number from 0 to 2**63 - 1."),
        ({"seed": 1.5}, "seed: 1.5 is no seed."),
        ({"seed": -1}, "seed: -1 is no seed."),
        ({"seed": 2**63}, "seed: 9223372036854775808 is no seed."),
        ({"device": "gpu"}, "device: 'gpu' cannot be used: "),
        ({"device": "meta"}, "device: 'meta' holds no data. Use 'cpu', or leave it out."),
        ({"device": 3.5}, "device: '3.5' cannot be used: "),
        ({"checkpoint": 3}, "checkpoint: 3 is no folder. Give a path."),
        ({"resume": True}, "resume: True is no folder. Give a path."),
        ({"checkpoint": "a", "resume": "b"}, "checkpoint, resume: 'a' and 'b' are two folders. Give the one to go on from as resume."),
    ],
)
def test_arguments_that_cannot_be_meant(quantize, net, images, options, message):
    with pytest.raises(fxquant.ConfigError) as caught:
        quantize(net, images, **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("device", "fix"), [("cpu", "or leave it out"), (None, "Use 'cpu'.")])
def test_a_device_without_double_precision(quantize, net, images, monkeypatch, device, fix):
    """As Apple's: found before work starts."""
    zeros = torch.zeros

    def single(*size, **options):
        if options.get("dtype") == torch.float64 and "device" in options:
            raise TypeError("Cannot convert to float64")
        return zeros(*size, **options)

    monkeypatch.setattr(torch, "zeros", single)
    with pytest.raises(fxquant.ConfigError, match=f"device: 'cpu' cannot be used: Cannot convert to float64.*{fix}"):
        quantize(net, images, device=device)


# Devices


def test_device_given_explicitly(quantize, net, images):
    assert torch.equal(quantize(net, images, device="cpu")(images[0]), quantize(net, images)(images[0]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("home", "device"), [("cuda", None), ("cpu", "cuda"), ("cuda", "cpu")])
def test_model_and_loader_on_different_devices(quantize, net, images, home, device):
    quantized = quantize(net.to(home), images, device=device, cat=True)
    place = torch.device(device or home).type
    assert {value.device.type for value in quantized.state_dict().values()} == {place}
    check_runs(quantized, images[0].to(place))


# A failure half-way


STAGES = [
    (passes.Canonicalize, "run"),
    (passes.FoldBatchNorm, "match"),
    (passes.InsertObservers, "run"),
    (passes.InsertFakeQuant, "run"),
    (passes.CorrectBias, "run"),
    (passes.Freeze, "run"),
    (passes.AppendCAT, "run"),
]


@pytest.mark.parametrize(("stage", "method"), STAGES, ids=[stage.__name__ for stage, _ in STAGES])
def test_a_failure_half_way_leaves_the_network_alone(quantize, net, images, random_states, monkeypatch, stage, method):
    original = getattr(stage, method)
    calls = []

    def fail(self, *args):
        original(self, *args)  # half the work is done
        calls.append(stage)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, method, fail)
    monkeypatch.setattr("fxquant.correction.select_cat", chosen_for_sure)
    before = random_states()
    with pytest.raises(KeyboardInterrupt):
        quantize(net, images, cat=True)
    assert calls == [stage]
    assert random_states() == before


def chosen_for_sure(student: Tensor, teacher: Tensor, **_: Any) -> SimpleNamespace:
    cat = fxquant.cat.fit_cat(student, teacher, fit="kl", clusters=1)
    return SimpleNamespace(cat=cat, fit="kl", clusters=1, pca=0, alpha=0.4, kl_before=1.0, kl_after=0.5, table=[])


def test_a_loader_that_fails_half_way(quantize, net, images, random_states):
    def loader():
        yield images[0]
        raise OSError("no such file: 17.png")

    before = random_states()
    with pytest.raises(OSError, match=r"17\.png"):
        quantize(net, loader())
    assert random_states() == before


@pytest.mark.parametrize("target", ["fxquant.quantize.place", "fxquant.record.layer_rows", "fxquant.correction.logits_of_each"])
def test_a_failure_between_the_passes_leaves_the_network_alone(quantize, net, images, monkeypatch, target):
    def fail(*args, **kwargs):
        raise MemoryError(target)

    module, name = target.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(module), name, fail)  # as a string, "fxquant.quantize" would be the function
    with pytest.raises(MemoryError):
        quantize(net, images, cat=True)
