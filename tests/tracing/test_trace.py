"""The tracer on small networks that each hold one difficulty. Equality is exact unless attention is rewritten."""

from __future__ import annotations

import copy
import operator
import warnings
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, GroupNormAct, LayerNormAct2d, StdConv2d
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torchvision.models import mobilenet_v2, resnet18, swin_t
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation

import fxquant
from fxquant.errors import FxquantWarning, TraceError
from fxquant.tracing import trace

IMAGES = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """A convolution to 4 channels, then `body(self, features)`."""

    def __init__(self, body: Any = None, **members: Any):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.body = body
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, images: Tensor) -> Any:
        return self.body(self, self.conv(images))


def net(body: Any = None, **members: Any) -> nn.Module:
    return Net(body, **members).eval()


def check(model: nn.Module, example: Tensor = IMAGES, tolerance: float = 0.0, **kwargs: Any) -> torch.fx.GraphModule:
    """Trace, and compare with eager mode at batch 1, 3 and 5."""
    graph_module = trace(model, example, **kwargs)
    for n in (1, 3, 5):
        images = torch.randn(n, *example.shape[1:], dtype=example.dtype)
        with torch.no_grad():
            ours, theirs = (torch.utils._pytree.tree_leaves(m(images.clone())) for m in (graph_module, model))
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return graph_module


def targets(graph_module: torch.fx.GraphModule) -> Counter[Any]:
    return Counter(node.target for node in graph_module.graph.nodes)


def ops(graph_module: torch.fx.GraphModule) -> Counter[str]:
    return Counter(node.op for node in graph_module.graph.nodes)


# Structure


def test_resnet18_keeps_modules_and_names() -> None:
    model = resnet18().eval()
    traced = check(model, torch.randn(2, 3, 64, 64))
    kinds = Counter(type(traced.get_submodule(n.target)) for n in traced.graph.nodes if n.op == "call_module")
    assert kinds == {nn.Conv2d: 20, nn.BatchNorm2d: 20, nn.ReLU: 17, nn.MaxPool2d: 1, nn.AdaptiveAvgPool2d: 1, nn.Linear: 1}
    assert targets(traced)[operator.add] == 8
    assert len(traced.graph.nodes) == 1 + 60 + 8 + 1 + 1
    assert {n for n, _ in traced.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert traced.__class__.__name__ == "ResNet"
    assert not traced.training


def test_every_node_has_a_value_and_a_place() -> None:
    traced = trace(resnet18().eval(), torch.randn(2, 3, 64, 64))
    nodes = {node.name: node for node in traced.graph.nodes}
    for node in nodes.values():
        batch, *_ = node.meta["val"].shape
        assert isinstance(batch, torch.SymInt)
        assert next(iter(node.meta["nn_module_stack"])) == ""
    assert nodes["layer3_0_conv1"].meta["val"].shape[1:] == (256, 4, 4)
    assert [path for path, _ in nodes["layer3_0_conv1"].meta["nn_module_stack"].values()] == [
        "",
        "layer3",
        "layer3.0",
        "layer3.0.conv1",
    ]
    assert list(nodes["add_3"].meta["nn_module_stack"])[-1] == "layer2.1"
    assert list(nodes["layer3_0_relu_1"].meta["nn_module_stack"])[-1] == "layer3.0.relu@1"


def test_nothing_with_weights_is_a_leaf() -> None:
    model = nn.Sequential(Conv2dNormActivation(3, 8), mobilenet_v2().features[1:3], swin_t().features[1][0].attn)
    model[1][0].conv[0][0] = nn.Conv2d(8, 8, 3, padding=1)
    model[1][0].conv[0][1] = nn.BatchNorm2d(8)
    model[1][0].conv[1] = nn.Conv2d(8, 16, 1)
    model[1][0].conv[2] = nn.BatchNorm2d(16)
    model[2] = nn.Sequential(nn.Conv2d(24, 96, 1), Permute(), model[2])
    traced = check(model.eval(), torch.randn(2, 3, 28, 28))
    for node in traced.graph.nodes:
        if node.op == "call_module":
            assert not list(traced.get_submodule(node.target).children())
    assert targets(traced)[F.linear] == 2
    assert {"2.2.qkv.weight", "2.2.proj.weight"} <= set(targets(traced))
    assert all(isinstance(traced.get_parameter(name), nn.Parameter) for name in ("2.2.qkv.weight", "2.2.proj.weight"))


class Permute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def test_norms_with_an_activation_stay_leaves_and_other_subclasses_do_not() -> None:
    model = nn.Sequential(
        Conv2dSame(3, 8, 3, stride=2),
        BatchNormAct2d(8),
        StdConv2d(8, 8, 3),
        GroupNormAct(8, 2),
        LayerNormAct2d(8, act_layer=nn.GELU),
    )
    traced = check(model.eval(), torch.randn(2, 3, 17, 17))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["1", "3", "4"]
    assert {"0.weight", "2.weight"} <= set(targets(traced))
    assert targets(traced)[F.conv2d] == 2


def test_shared_modules_stay_shared() -> None:
    model = net(lambda self, x: self.conv2(self.conv2(x)), conv2=nn.Conv2d(4, 4, 1))
    model.alias = model.conv2
    assert [n.target for n in check(model).graph.nodes if n.op == "call_module"] == ["conv", "conv2", "conv2"]


def test_leaf_modules_stay_whole_even_if_they_cannot_be_traced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), ValueBranch())
    traced = check(model.eval(), leaf_modules=(ValueBranch,))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
    value = list(traced.graph.nodes)[-2].meta["val"]
    assert isinstance(value.shape[0], torch.SymInt)
    assert value.shape[1:] == (3, 8, 8)


def test_leaf_modules_that_could_be_traced() -> None:
    traced = check(resnet18().eval(), torch.randn(2, 3, 32, 32), leaf_modules=(BasicBlock,))
    assert ops(traced) == {"placeholder": 1, "call_module": 4 + 8 + 2, "call_function": 1, "output": 1}
    assert next(n for n in traced.graph.nodes if n.target == "layer2.0").meta["val"].shape[1:] == (128, 4, 4)
    assert not any(isinstance(t, FakeTensor) for t in traced.state_dict().values())


class ValueBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


# Sizes


def test_batch_sizes_become_size_nodes_of_the_nearest_tensor() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        windows = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(n * 4, 16, c)
        m = windows.shape[0] // 4
        return windows.view(m, h * w, c)

    traced = check(net(body))
    nodes = list(traced.graph.nodes)
    sizes = [n for n in nodes if n.target == "size"]
    assert [n.args[0].target for n in sizes] == ["conv", "permute", "reshape"]
    assert targets(traced)[operator.mul] == 1
    assert targets(traced)[operator.floordiv] == 1
    assert all(isinstance(n.meta["val"], torch.SymInt) for n in sizes)


def test_static_sizes_are_plain_numbers_and_unused_sizes_vanish() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        assert type(c) is int
        assert isinstance(x, Tensor)
        assert x.dtype == torch.float32
        return x.flatten(1) if h == w else x.sum(n)

    traced = check(net(body))
    assert targets(traced) == {"images": 1, "conv": 1, "flatten": 1, "output": 1}


def test_factories_with_the_batch_size_follow_the_batch_and_the_device() -> None:
    def body(self: nn.Module, x: Tensor) -> list[Tensor]:
        n = x.shape[0]
        return [
            torch.zeros(n, 2, device=x.device) + 1,
            torch.arange(n * 2, device=x.device),
            x.new_full((n, 1), 2.0),
            x / n + n**-0.5,
        ]

    traced = check(net(body))
    assert not any(isinstance(value, torch.device) for n in traced.graph.nodes for value in n.kwargs.values())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda self, x: x * int(x.shape[0]), "batch size as a number"),
        (lambda self, x: sum(x[0] for _ in range(x.shape[0])), "batch size as a number"),
        (lambda self, x: torch.stack(list(x)), "batch size as a number"),
        (lambda self, x: x if x.shape[0] > 4 else -x, "compares the batch size B with a number"),
        (lambda self, x: x if x.shape[0] % 2 else -x, "compares the batch size B with a number"),
        (lambda self, x: x if x.shape[0] > 1 else -x, "compares the batch size B with a number"),
        (lambda self, x: x if x.shape[0] <= 1 else -x, "compares the batch size B with a number"),
        (lambda self, x: x if x.shape[0] // 2 else -x, "compares the batch size B with a number"),
    ],
)
def test_a_graph_for_one_batch_size_is_refused(body: Any, words: str) -> None:
    with pytest.raises(TraceError, match=words) as caught:
        trace(net(body), IMAGES)
    assert "test_trace.py:" in str(caught.value)
    assert "x.shape[0]" in str(caught.value)


def test_what_holds_for_every_batch_size_may_be_asked() -> None:
    graph = check(net(lambda self, x: x if x.shape[0] > 0 and x.shape[0] * 2 >= 2 and x.shape[0] == x.size(0) else -x))
    assert targets(graph) == {"images": 1, "conv": 1, "output": 1}


def test_spatial_sizes_may_be_odd_and_the_example_batch_does_not_matter() -> None:
    model = resnet18().eval()
    graphs = [trace(model, torch.randn(n, 3, 35, 47)).code for n in (1, 4)]
    assert graphs[0] == graphs[1]


# In-place operations, constants, outputs


def test_writes_survive_and_sums_in_place_become_sums() -> None:
    def body(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.zeros_like(x)
        y[:, :2] = x[:, :2]
        y[:, 2:].copy_(x[:, 2:])
        z = F.relu(x)
        z += y
        w = z * 2
        w.view(-1).add_(1)
        return y, F.relu_(z), w

    count = targets(check(net(body)))
    assert count[operator.setitem] == 1
    assert count["copy_"] == 1
    assert count[operator.add] == 1, "z has no other name, so z += y is z + y"
    assert count[operator.iadd] == 1, "the view shares memory with w"


def test_a_module_in_place_is_followed_by_its_readers() -> None:
    traced = check(net(lambda self, x: (self.relu(x), x)[1] + 1, relu=nn.ReLU(inplace=True)))
    relu = next(n for n in traced.graph.nodes if n.target == "relu")
    assert [n.target for n in relu.users] == [operator.add]


def test_the_graph_does_not_write_into_its_input_unless_the_model_does() -> None:
    images = torch.randn(3, 3, 8, 8)
    before = images.clone()
    traced = trace(nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)).eval(), IMAGES)
    traced(images)
    assert torch.equal(images, before)


def test_constants_become_buffers() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        mask = x.new_zeros(8, 8)
        mask[:4, 4:] = -1.0
        position = torch.arange(8.0, device=x.device)
        y = x + mask + position
        position[0] = 9.0
        return y * position

    traced = check(net(body))
    assert len(dict(traced.named_buffers())) == 3
    assert all(name in traced.state_dict() for name, _ in traced.named_buffers())
    assert ops(traced) == {"placeholder": 1, "call_module": 1, "get_attr": 3, "call_function": 3, "output": 1}
    assert traced.to("meta")(torch.empty(7, 3, 8, 8, device="meta")).shape == (7, 4, 8, 8)


def test_writing_an_input_into_a_constant_starts_afresh_in_every_run() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        sums = torch.zeros(2, 8)
        sums[:, 1:] = x.sum((0, 1, 2))[1:]
        return sums

    check(net(body))


def test_writing_an_input_into_a_view_of_a_constant_is_refused() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        sums = torch.zeros(2, 8)
        sums[0] += x.sum((0, 1, 2))
        return sums

    with pytest.raises(TraceError, match="into a view of a constant"):
        trace(net(body), IMAGES)


def test_python_may_look_at_values_of_weights_and_buffers() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return x * float(self.scale) if self.flag else -x

    traced = check(net(body, scale=nn.Parameter(torch.tensor(2.0)), flag=torch.tensor(True)))
    assert targets(traced) == {"images": 1, "conv": 1, operator.mul: 1, "output": 1}


def test_random_numbers_are_not_frozen() -> None:
    traced = trace(net(lambda self, x: x + torch.rand(8)), IMAGES)
    assert not torch.equal(traced(IMAGES), traced(IMAGES))


class Pair(NamedTuple):
    main: Tensor
    aux: Tensor | None


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: (x, x + 1),
        lambda self, x: [x, [x * 2, {"a": -x}]],
        lambda self, x: {"logits": x.mean((2, 3)), "size": x.shape[0]},
        lambda self, x: Pair(x.mean((2, 3)), None),
        lambda self, x: x.max(dim=1),
    ],
)
def test_outputs_of_every_form(body: Any) -> None:
    model = net(body)
    ours, theirs = check(model)(IMAGES), model(IMAGES)
    assert isinstance(ours, (type(theirs), tuple))
    assert type(ours) is type(theirs) or type(theirs).__module__ == "torch.return_types"


def test_operators_have_one_spelling() -> None:
    def body(self: nn.Module, x: Tensor) -> Any:
        a, b = x.add(1).chunk(2, 1)
        c = a * 2
        c **= 3
        return (
            1 - a,
            2 / (b + 9),
            2**a,
            b**2,
            c,
            a // 2,
            a % 3,
            a @ b,
            -a,
            (a > 0) & ~(b > 0),
            a.mT,
            a.sub(b, alpha=2),
            abs(a),
            a[:, :, None],
        )

    count = targets(check(net(body)))
    for target in (operator.sub, operator.truediv, operator.pow, operator.floordiv, operator.mod, operator.matmul, operator.neg):
        assert count[target] == (3 if target is operator.pow else 1)
    assert count[operator.add] == 2
    assert count["sub"] == 1
    assert count[getattr] == 1


def test_float64() -> None:
    assert (
        check(resnet18().eval().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64))(
            torch.randn(1, 3, 32, 32, dtype=torch.float64)
        ).dtype
        == torch.float64
    )


def test_a_buffer_that_counts_calls_counts_calls_of_the_graph() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls

    traced = trace(net(body, calls=torch.zeros(())), IMAGES)
    model = net(body, calls=torch.zeros(()))
    model.load_state_dict(traced.state_dict())
    for count in (1, 2):
        assert torch.equal(traced(IMAGES), model(IMAGES))
        assert traced.calls == count


# The caller's model


def test_the_model_is_not_touched() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.conv, self.cache = nn.Conv2d(3, 3, 1), {}

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.cache["last"] = x
            return self.conv(x)

    model = Caching()
    state = copy.deepcopy(model.state_dict())
    call = nn.Module.__call__
    with pytest.warns(FxquantWarning, match=r"train mode.*model\.eval\(\)"):
        trace(model, IMAGES)
    with pytest.raises(TraceError), warnings.catch_warnings(action="ignore"):
        trace(model, torch.randn(2, 4, 8, 8))
    assert model.cache == {}
    assert model.training
    assert model.conv.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert nn.Module.__call__ is call
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_submodule_in_train_mode_is_named() -> None:
    model = net(lambda self, x: self.parts(x), parts=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout()))
    expected = trace(model, IMAGES)(IMAGES)
    model.parts[1].train()
    with pytest.warns(
        FxquantWarning, match=r"^Net\.parts\.1 is in train mode; a copy in eval mode is traced\. Call model\.eval\(\) first"
    ) as caught:
        traced = trace(model, IMAGES)
    assert len(caught) == 1
    assert not any(traced.get_submodule(str(node.target)).training for node in traced.graph.nodes if node.op == "call_module")
    assert torch.equal(traced(IMAGES), expected)
    assert [name for name, module in model.named_modules() if module.training] == ["parts.1"]


def test_eval_mode_does_not_warn() -> None:
    with warnings.catch_warnings(action="error"):
        trace(net(lambda self, x: x), IMAGES)


@pytest.mark.parametrize(
    ("norm", "example", "layout"),
    [
        (nn.BatchNorm1d(6), torch.zeros(4, 6), torch.contiguous_format),
        (nn.BatchNorm1d(6), torch.zeros(4, 6, 5), torch.contiguous_format),
        (nn.BatchNorm2d(6, affine=False), torch.zeros(4, 6, 5, 7), torch.contiguous_format),
        (nn.BatchNorm2d(6), torch.zeros(4, 6, 5, 7), torch.channels_last),
        (nn.BatchNorm2d(6, track_running_stats=False), torch.zeros(4, 6, 5, 7), torch.contiguous_format),
        (nn.BatchNorm3d(6), torch.zeros(4, 6, 5, 7, 3), torch.channels_last_3d),
    ],
)
def test_values_of_batch_norms_have_the_form_of_true_ones(norm: nn.Module, example: Tensor, layout: torch.memory_format) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.abs().contiguous(memory_format=layout))  # type: ignore[no-any-return]

    model = Normed().eval()
    graph_module = check(model, example)
    true, traced = model(example), next(node.meta["val"] for node in graph_module.graph.nodes if node.op == "call_module")
    assert isinstance(traced, FakeTensor)
    assert (traced.shape[1:], traced.dtype, traced.stride()[1:]) == (true.shape[1:], true.dtype, true.stride()[1:])


def test_a_batch_norm_of_a_transposed_tensor_is_contiguous() -> None:
    model = net(lambda self, x: self.norm(x.flatten(2).transpose(1, 2)).view(x.shape[0], -1), norm=nn.BatchNorm1d(64))
    check(model, tolerance=1e-6)
    check(net(lambda self, x: self.norm(x.transpose(2, 3)).view(x.shape[0], -1), norm=nn.BatchNorm2d(4)), tolerance=1e-6)


def test_a_batch_norm_with_a_forward_of_its_own_is_run() -> None:
    norm = nn.BatchNorm2d(4)
    norm.forward = lambda x: torch.cat([x, x], 1)  # type: ignore[method-assign]
    assert targets(check(net(lambda self, x: self.norm(x), norm=norm))) == {"images": 1, "conv": 1, torch.cat: 1, "output": 1}


def test_a_batch_norm_called_with_more_than_its_input() -> None:
    with pytest.raises(TraceError, match=r"^norm \(BatchNorm2d\).*mask"):
        trace(net(lambda self, x: self.norm(x, mask=None), norm=nn.BatchNorm2d(4)), IMAGES)


@pytest.mark.parametrize(
    ("norm", "example"),
    [(nn.BatchNorm2d(6), torch.zeros(4, 5, 4, 4)), (nn.BatchNorm2d(6), torch.zeros(4, 6)), (nn.BatchNorm1d(6), torch.zeros(4, 6, 5, 5))],
)
def test_a_batch_norm_that_does_not_fit_its_input(norm: nn.Module, example: Tensor) -> None:
    with pytest.raises(TraceError, match=r"^0 \(BatchNorm\dd\)"):
        trace(nn.Sequential(norm).eval(), example)


def test_the_modes_of_the_caller_do_not_matter() -> None:
    model = resnet18().eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        traced = trace(model, torch.randn(2, 3, 32, 32))
    assert {node.meta["val"].dtype for node in traced.graph.nodes} == {torch.float32}
    assert all(parameter.requires_grad for parameter in traced.parameters())


def test_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = resnet18().eval()
    assert trace(model, torch.randn(2, 3, 64, 64))(torch.empty(5, 3, 64, 64, device="meta")).shape == (5, 1000)


def test_hooks_are_recorded_around_the_node() -> None:
    """Passes replace torch's layers, and what hangs on them would be lost."""
    model = net(lambda self, x: self.block(x), block=nn.Sequential(nn.ReLU()))
    model.conv.register_forward_hook(lambda module, args, output: output * 2)
    model.conv.register_forward_hook(lambda module, args, kwargs, output: output - 3, with_kwargs=True)
    model.conv.register_forward_pre_hook(lambda module, args: args[0] - 1)
    model.conv.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] / 2,), kwargs), with_kwargs=True)
    model.block.register_forward_hook(lambda module, args, output: output + 1)
    graph = check(model)
    order = [node.target for node in graph.graph.nodes]
    assert order == ["images", operator.sub, operator.truediv, "conv", operator.mul, operator.sub, "block.0", operator.add, "output"]
    assert not graph.conv._forward_hooks and len(model.conv._forward_hooks) == 2


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4), nn.Dropout(), nn.Identity(), nn.ReLU()])
@pytest.mark.parametrize("whole", [False, True])
def test_hooks_that_only_look_leave_no_trace(layer: nn.Module, whole: bool) -> None:
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 1), layer).eval(), []
    before = targets(check(model))
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert targets(check(model, leaf_modules=(type(layer),) if whole else ())) == before
    assert seen
    handle.remove()


def test_hooks_inside_of_and_on_an_opaque_module_stay() -> None:
    class Inside(nn.Sequential):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Inside(nn.Conv2d(4, 4, 1), nn.ReLU())).eval()
    model[1][0].register_forward_hook(lambda module, args, output: output + 1)
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    assert targets(check(model, leaf_modules=(Inside,))) == {"input": 1, "0": 1, "1": 1, "output": 1}


def test_hooks_of_a_layer_that_is_called_twice_and_of_a_recurrent_one() -> None:
    shared, lstm = nn.ReLU(), nn.LSTM(8, 4, batch_first=True)
    model = net(lambda self, x: self.lstm(self.relu(self.relu(x).flatten(1, 2)))[0], relu=shared, lstm=lstm)
    shared.register_forward_hook(lambda module, args, output: output - 0.1)
    lstm.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))
    found = targets(check(model))
    assert (found["relu"], found[operator.sub], found["lstm"], found[operator.mul]) == (2, 2, 1, 1)


@pytest.mark.parametrize("how", ["hook", "hook with keywords", "pre-hook with keywords", "forward"])
def test_attention_with_a_hook_or_a_forward_of_its_own(how: str) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = net(lambda self, x: self.attention(*[x.flatten(2).repeat(1, 2, 1)[..., :16]] * 3)[0], attention=attention)
    plain, call = check(model, tolerance=1e-5)(IMAGES), attention.forward
    if how == "forward":
        attention.forward = lambda *args, **kwargs: (2 * call(*args, **kwargs)[0], None)  # type: ignore[method-assign]
    elif how == "hook":
        attention.register_forward_hook(lambda module, args, output: (2 * output[0], None))
    elif how == "hook with keywords":
        attention.register_forward_hook(lambda module, args, kwargs, output: (2 * output[0], None), with_kwargs=True)
    else:
        attention.register_forward_pre_hook(lambda module, args, kwargs: ((2 * args[0], *args[1:]), kwargs), with_kwargs=True)
    other = check(model, tolerance=1e-5)(IMAGES)
    assert (other - plain).abs().max() > 0.01
    if "pre" not in how:
        torch.testing.assert_close(other, 2 * plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm], ids=["weight", "spectral"])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_that_hooks_compute(norm: Any, ran: bool) -> None:
    """Before the first forward such a weight carries its gradient, which ``copy.deepcopy`` does not take."""
    model = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.ReLU()).eval()
    if ran:
        with torch.no_grad():
            model(IMAGES)
    check(model)


@pytest.mark.parametrize("name", ["code", "graph", "meta", "recompile", "_graph", "_code", "_tracer_cls", "shape_env"])
def test_names_that_a_graph_needs_itself(name: str) -> None:
    model = nn.Sequential(OrderedDict([(name, nn.Sequential(nn.Conv2d(3, 4, 3))), ("last", nn.ReLU())])).eval()
    graph = check(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == [f"{name}_.0", "last"]
    assert [child for child, _ in model.named_children()] == [name, "last"]


def test_parameters_and_buffers_under_such_names() -> None:
    model = net(lambda self, x: x * self.meta + self.code, meta=nn.Parameter(torch.randn(4, 1, 1)), code=torch.randn(4, 1, 1))
    graph = check(model)
    assert {name for name, _ in [*graph.named_parameters(), *graph.named_buffers()]} >= {"meta_", "code_"}


def test_wrappers_come_off() -> None:
    inner = net(lambda self, x: x + 1)
    wrapped = nn.DataParallel(torch.compile(nn.DataParallel(inner))).eval()
    assert set(targets(trace(wrapped, IMAGES))) == {"images", "conv", operator.add, "output"}
    nested = nn.Sequential(torch.compile(nn.Conv2d(3, 3, 1)), nn.DataParallel(nn.ReLU())).eval()
    assert [n.target for n in trace(nested, IMAGES).graph.nodes if n.op == "call_module"] == ["0", "1"]


def test_allowed_attributes_and_deepcopy() -> None:
    model = net(lambda self, x: x + self.offset, offset=torch.zeros(1))
    model.num_classes, model.default_cfg, model.secret = 7, {"mean": (0.5,)}, 1
    traced = trace(model, IMAGES)
    copied = copy.deepcopy(traced)
    for g in (traced, copied):
        assert g.num_classes == 7
        assert g.default_cfg == {"mean": (0.5,)}
        assert not hasattr(g, "secret")
        assert not hasattr(g, "pretrained_cfg")
    with torch.no_grad():
        copied.offset += 1
    assert torch.equal(traced(IMAGES) + 1, copied(IMAGES))


def test_tracing_a_graph_module_again_gives_the_same_graph() -> None:
    first = trace(net(lambda self, x: F.relu(x.view(x.shape[0], -1)) @ self.w, w=nn.Parameter(torch.randn(256, 3))), IMAGES)
    again = check(first)
    assert targets(first) == targets(again)


def test_the_result_pickles_and_compiles() -> None:
    model = net(lambda self, x: F.relu(x).mean((2, 3)))
    traced = trace(model, IMAGES)
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    for n in (2, 3, 4):
        images = torch.randn(n, 3, 8, 8)
        assert torch.equal(compiled(images), model(images))


# Failures


def test_a_wrong_number_of_channels() -> None:
    with pytest.raises(TraceError, match=r"^conv1 \(Conv2d\) at .*resnet\.py:\d+: .*3 channels.*example is \[2, 1, 64, 64\]") as caught:
        trace(resnet18().eval(), torch.randn(2, 1, 64, 64))
    assert "Pass an example" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_wrong_dtype() -> None:
    with pytest.raises(TraceError, match=r"^conv \(Conv2d\) at .*example is torch\.float32.*Pass example\.to\(torch\.float64\)"):
        trace(net(lambda self, x: x).double(), IMAGES)


def test_control_flow_on_values_names_the_line_and_the_class_to_keep() -> None:
    line = ValueBranch.forward.__code__.co_firstlineno + 1
    with pytest.raises(TraceError, match=rf"^1 \(ValueBranch\) at .*test_trace\.py:{line}: .*values of a tensor") as caught:
        trace(nn.Sequential(nn.Conv2d(3, 3, 1), ValueBranch()).eval(), IMAGES)
    assert "leaf_modules=(ValueBranch,)" in caught.value.fix


def test_a_shape_that_depends_on_values() -> None:
    with pytest.raises(TraceError, match="shape of a result depends on the values"):
        trace(net(lambda self, x: x[x > 0]), IMAGES)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x.relu() * 2


def with_keys_of_its_own(self: Any, x: Tensor) -> Tensor:
    tokens, heads = x.flatten(2).permute(2, 0, 1), self.heads
    weights = (heads.in_proj_weight, heads.in_proj_bias, None, None, False, 0.0, heads.out_proj.weight, heads.out_proj.bias)
    keys = tokens.permute(1, 0, 2).reshape(-1, tokens.shape[0], 2)
    return F.multi_head_attention_forward(tokens, tokens, tokens, 4, 2, *weights, training=False, static_k=keys)[0]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (net(lambda self, x: scripted(x)), "a TorchScript function is called.*Call the Python function"),
        (net(with_keys_of_its_own, heads=nn.MultiheadAttention(4, 2)), "static_k or static_v.*Write this part of forward with"),
        (net(lambda self, x: x * torch.sym_sqrt(x.shape[0])), "a size computed as .*sqrt.*Write this part of forward with"),
        (net(lambda self, x: x * (x.shape[0] > 3)), r"compares the batch size B with a number \(B > 3\)"),
    ],
    ids=["script", "static keys", "root of the batch", "truth"],
)
def test_what_no_node_can_say(model: nn.Module, words: str) -> None:
    with pytest.raises(TraceError, match=rf"test_trace\.py:\d+: .*{words}"):
        trace(model, IMAGES)


@pytest.mark.parametrize("whole", [False, True])
def test_scripted_modules_are_named(whole: bool) -> None:
    part = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval())
    model, where = (part, type(part).__name__) if whole else (nn.Sequential(nn.Identity(), part).eval(), "1")
    for call in (lambda: trace(model, IMAGES), lambda: fxquant.quantize(model, [IMAGES], progress=False)):
        with pytest.raises(TraceError, match=rf"^{where}: is TorchScript, whose operations cannot be seen. Use the Python module"):
            call()


def test_more_than_one_input() -> None:
    with pytest.raises(TraceError, match=r"missing 1 required positional argument.*Wrap the model"):
        trace(nn.Bilinear(3, 3, 3).eval(), IMAGES)


@pytest.mark.parametrize(("example", "words"), [([IMAGES], "a list, not a tensor"), (torch.tensor(1.0), "without dimensions")])
def test_an_example_that_is_no_batch(example: Any, words: str) -> None:
    with pytest.raises(TraceError, match=f"^example: .*{words}"):
        trace(net(lambda self, x: x), example)


def test_a_model_that_cannot_be_copied() -> None:
    model = net(lambda self, x: x)
    model.left_over = (item for item in ())
    with pytest.raises(TraceError, match="cannot be copied"):
        trace(model, IMAGES)
