"""OpenAttention: fused attention becomes two matrix products and a softmax."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, apply, filled, ops, traced
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant import trace
from fxquant.kinds import kind
from fxquant.passes import PREPARE, Canonicalize, OpenAttention
from fxquant.pipeline import PassLog, Pipeline

N, HEADS, L, S, D = 2, 4, 6, 5, 3
PRODUCTS = Counter({"matmul": 2, "mul": 1, "softmax": 1})


class Attend(nn.Module):
    """Attention over ``[N, L, heads * D]``, keys and values of another length: what else it is given comes from `call`."""

    def __init__(self, call: dict[str, Any], keys: int = S, heads: int = HEADS, **constants: Tensor):
        super().__init__()
        self.call, self.keys, self.heads = call, keys, heads
        self.project = nn.Linear(HEADS * D, (HEADS + 2 * heads) * D)
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).split([HEADS * D, self.heads * D, self.heads * D], -1)
        q, k, v = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat(1, 1, math.ceil(self.keys / L), 1)[:, :, : self.keys] for part in (k, v))
        options = {name: value(self, x) if callable(value) else value for name, value in self.call.items()}
        return F.scaled_dot_product_attention(q, k, v, **options)


def opened(model: nn.Module, length: int = L) -> tuple[GraphModule, GraphModule, PassLog]:
    """Return the graph before and after the pass, which give equal values at another batch size, and the log."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gm = trace(model.eval(), torch.randn(N, length, HEADS * D))
        new, log = apply(gm, Canonicalize(), OpenAttention())
        for count in (1, 5):
            x = torch.randn(count, length, HEADS * D)
            with torch.no_grad():
                torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-6)
    return gm, new, log


def kinds(gm: GraphModule) -> Counter[str]:
    return Counter({word: count for word, count in ops(gm).items() if word not in ("view", "getitem", "size", "linear")})


ALL = torch.ones(L, S, dtype=torch.bool)
LOWER = ALL.tril()
BLIND = ALL.clone()
BLIND[1] = False
LINE = torch.linspace(-1, 1, L * S).view(L, S)


def infinite(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)


CASES: dict[str, tuple[nn.Module, Counter[str]]] = {
    "plain": (Attend({}), Counter()),
    "scale": (Attend({"scale": 0.3}), Counter()),
    "scale None, no dropout, not causal": (Attend({"scale": None, "dropout_p": 0.0, "is_causal": False, "attn_mask": None}), Counter()),
    "causal": (Attend({"is_causal": True}), Counter(masked_fill=1)),
    "causal, more keys": (Attend({"is_causal": True}, keys=9), Counter(masked_fill=1)),
    "bool": (Attend({"attn_mask": LOWER}), Counter(logical_not=1, masked_fill=1)),
    "bool for each head": (Attend({"attn_mask": LOWER.expand(1, HEADS, L, S)}), Counter(logical_not=1, masked_fill=1)),
    "bool of keys": (Attend({"attn_mask": torch.arange(S)[None] < 3}), Counter(logical_not=1, masked_fill=1)),
    "bool of queries": (
        Attend({"attn_mask": (torch.arange(L) != 2)[:, None]}),
        Counter(logical_not=1, masked_fill=2, all=1),
    ),
    "bool, a blind row": (Attend({"attn_mask": BLIND}), Counter(logical_not=1, masked_fill=2, all=1)),
    "bool, computed": (
        Attend({"attn_mask": lambda s, x: (x[:, None, :, :S] > 0) & (x[:, None, :, :1] > -0.5)}),
        Counter({"logical_not": 1, "masked_fill": 2, "all": 1, "gt": 2, "and_": 1}),
    ),
    "float": (Attend({"attn_mask": LINE}), Counter(add=1)),
    "float with infinities": (Attend({"attn_mask": infinite(LOWER)}), Counter(add=1)),
    "float, a blind row": (Attend({"attn_mask": infinite(BLIND)}), Counter(add=1, eq=1, clamp_min=1, all=1, masked_fill=1)),
    "float, computed": (Attend({"attn_mask": lambda s, x: x[:, None, :, :S] * 2.0}), Counter(add=1, mul=1)),
    "float, computed with infinities": (
        Attend({"attn_mask": lambda s, x: torch.zeros(L, S).masked_fill(x[:, None, :, :S] < 0.5, -math.inf)}),
        Counter({"add": 1, "eq": 1, "clamp_min": 1, "all": 1, "masked_fill": 2, "lt": 1}),
    ),
    "float, out of a table": (
        Attend(
            {"attn_mask": lambda s, x: s.table[s.index].permute(2, 0, 1)},
            table=torch.randn(7, HEADS),
            index=torch.arange(L * S).view(L, S) % 7,
        ),
        Counter(add=1),
    ),
    "grouped": (Attend({"enable_gqa": True}, heads=2), Counter()),
    "grouped, one head": (Attend({"enable_gqa": True, "attn_mask": LINE}, heads=1), Counter(add=1)),
    "grouped, as many heads": (Attend({"enable_gqa": True, "is_causal": True}), Counter(masked_fill=1)),
}


def spelled(gm: GraphModule) -> Counter[str]:
    """Count operations, those without a kind by name."""
    found = kinds(gm)
    found.pop("other", None)
    for node in gm.graph.nodes:
        if kind(node) == "other":
            found[str(getattr(node.target, "__name__", node.target))] += 1
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_argument(name):
    model, more = CASES[name]
    gm, new, log = opened(model)
    assert ops(gm)["attention"] == 1
    assert spelled(new) == PRODUCTS + more
    assert (log.count, log.skipped) == (1, [])
    assert not OpenAttention()(new).modified


def test_positional_arguments_and_names():
    class Positional(Attend):
        def forward(self, x: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(x, x, x, None, 0.0, True)
            return F.scaled_dot_product_attention(value=y, query=x, key=y, attn_mask=LINE.new_zeros(L, L), scale=1.0)

    gm, new, log = opened(Positional({}))
    assert ops(gm)["attention"] == log.count == 2
    assert kinds(new)["matmul"] == 4


def test_the_graph():
    _, new, _ = opened(Attend({"attn_mask": LOWER}))
    nodes = {node.name: node for node in new.graph.nodes}
    assert nodes["matmul"].args == (nodes["mul"], nodes["transpose_3"])
    assert nodes["mul"].args[1] == 1 / math.sqrt(D)
    assert nodes["masked_fill"].args == (nodes["matmul"], nodes["logical_not"], -math.inf)
    assert nodes["softmax"].args == (nodes["masked_fill"], -1)
    assert nodes["matmul_1"].args[0] is nodes["softmax"]


def test_values_and_modules_of_the_new_nodes():
    gm = traced("fused_attention")
    new, _ = apply(gm, Canonicalize(), OpenAttention())
    batch = next(iter(new.graph.nodes)).meta["val"].shape[0]
    shapes = {
        node.name: tuple(node.meta["val"].shape[1:]) for node in new.graph.nodes if node.name in ("mul", "matmul", "softmax", "matmul_1")
    }
    assert shapes == {"mul": (2, 16, 4), "matmul": (2, 16, 16), "softmax": (2, 16, 16), "matmul_1": (2, 16, 4)}
    for node in new.graph.nodes:
        assert "val" in node.meta
        if node.name in shapes:
            assert node.meta["val"].shape[0].node.expr == batch.node.expr
            assert node.meta["val"].dtype == torch.float32
    fused = next(node for node in gm.graph.nodes if kind(node) == "attention")
    stacks = [node.meta.get("nn_module_stack") for node in new.graph.nodes if node.name in shapes]
    assert stacks == [fused.meta.get("nn_module_stack")] * 4


def test_causal_masks_of_one_size_are_one_buffer():
    class Twice(Attend):
        def forward(self, x: Tensor) -> Tensor:
            x = F.scaled_dot_product_attention(x + self.future_6x6, x, x, is_causal=True)
            x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            return F.scaled_dot_product_attention(x, x[:, :S], x[:, :S], is_causal=True)

    model = Twice({}, future_6x6=torch.zeros(1))
    _, new, _ = opened(model)
    buffers = {name: tuple(value.shape) for name, value in new.named_buffers()}
    assert buffers == {"future_6x6": (1,), "future_6x6_1": (6, 6), "future_6x5": (6, 5)}
    read = [node.target for node in new.graph.nodes if node.op == "get_attr"]
    assert read == ["future_6x6", "future_6x6_1", "future_6x6_1", "future_6x5"]


def test_blind_rows_are_zero_and_reach_no_quantizer_as_nan():
    _, new, _ = opened(Attend({"attn_mask": BLIND}))
    x = torch.randn(3, L, HEADS * D)
    interpreter = torch.fx.Interpreter(new, garbage_collect_values=False)
    with torch.no_grad():
        y = interpreter.run(x)
    assert y[:, :, 1].eq(0).all() and not y[:, :, 0].eq(0).any()
    assert all(value.isfinite().all() for node, value in interpreter.env.items() if kind(node) in ("softmax", "matmul"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes(dtype):
    model = Attend({"attn_mask": BLIND}).to(dtype).eval()
    x = torch.randn(N, L, HEADS * D, dtype=dtype)
    new, _ = apply(trace(model, x), Canonicalize(), OpenAttention())
    assert new(x).dtype == dtype
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-6)


def refused(body: Callable[[Any, Tensor], Tensor]) -> str:
    gm = trace(Net(body, project=nn.Linear(HEADS * D, HEADS * D)).eval(), torch.randn(N, L, HEADS * D))
    new, log = apply(gm, Canonicalize(), OpenAttention())
    assert ops(new)["attention"] == 1 and log.count == 0
    ((where, reason),) = log.skipped
    assert where == "scaled_dot_product_attention"
    return reason


def test_dropout_is_refused():
    assert refused(lambda s, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.25)) == (
        "its dropout_p is 0.25, which drops values in eval mode too; write dropout_p=self.p if self.training else 0.0"
    )


def test_a_length_that_depends_on_the_batch_is_refused_where_it_is_causal():
    def body(s: Any, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)[None]
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    assert "depends on the batch size" in refused(body)


def test_a_mask_and_causal_at_once_is_refused():
    """Torch itself refuses it, so only a graph that was edited can hold it."""
    gm = trace(Attend({"attn_mask": LOWER}).eval(), torch.randn(N, L, HEADS * D))
    next(node for node in gm.graph.nodes if kind(node) == "attention").update_kwarg("is_causal", True)
    _, log = apply(gm, OpenAttention())
    assert [reason for _, reason in log.skipped] == ["has a mask and is_causal=True, of which torch takes one"]


def test_a_graph_without_shapes_is_refused():
    gm = trace(Attend({}).eval(), torch.randn(N, L, HEADS * D))
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    _, log = apply(gm, OpenAttention())
    assert [reason for _, reason in log.skipped] == ["the shapes of what it reads are not known"]


def test_the_report_names_what_stays_fused():
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            # so small that nothing is dropped: quantize compares the graph with the network
            return self.fc(F.scaled_dot_product_attention(x, x, x, dropout_p=1e-12).mean(1))

    quantized = fxquant.quantize(Drops().eval(), [torch.randn(8, 3, 16, 16)], 8, 8, recipe="fast", progress=False)
    (log,) = (log for log in fxquant.report(quantized).record.passes if log.name == "open_attention")
    assert [where for where, _ in log.skipped] == ["scaled_dot_product_attention"]
    text = str(fxquant.report(quantized))
    assert "its dropout_p is 1e-12" in text
    assert "attention" in {row.kind for row in fxquant.report(quantized).record.layers}


def test_it_is_part_of_the_preparation():
    assert PREPARE.index(Canonicalize) < PREPARE.index(OpenAttention)
    new = Pipeline([step() for step in PREPARE]).run(traced("fused_attention"))
    assert ops(new)["attention"] == 0 and ops(new)["matmul"] == 2


class Masked(nn.Module):
    """Attention whose mask is a parameter, or is made of one."""

    def __init__(self, mask: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.patch, self.fc, self.mask = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5), mask
        self.whole, self.table = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(31))
        self.mlp = nn.Linear(2, 1)
        self.register_buffer("index", torch.arange(16)[:, None] - torch.arange(16) + 15)
        self.register_buffer("places", torch.randn(16, 16, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.fc(F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask(self)).mean(1))


MASKS: dict[str, Callable[[Any], Tensor]] = {
    "stored": lambda s: s.whole,
    "computed": lambda s: s.whole * 2.0,
    "out of a table": lambda s: s.table[s.index],
    "out of a network, folded": lambda s: s.mlp(s.places)[..., 0],
    "bool": lambda s: s.whole > 0,
}


@pytest.mark.parametrize("value", [0.0, -math.inf, math.nan])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_graph_is_not_up_to_parameters(mask, value):
    net = Masked(mask).eval()
    prepared = [Pipeline([step() for step in PREPARE]).run(trace(each, torch.randn(2, 3, 16, 16))) for each in (net, filled(net, value))]
    assert ops(prepared[0])["attention"] == 0
    assert str(prepared[0].graph) == str(prepared[1].graph)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_loading_into_a_network_without_weights(mask, tmp_path):
    net, images = Masked(mask).eval(), torch.randn(8, 3, 16, 16)
    quantized = fxquant.quantize(net, [images], 8, 8, cat=False, recipe="fast", progress=False)
    fxquant.save(quantized, tmp_path / "network.safetensors")
    assert torch.equal(fxquant.load(tmp_path / "network.safetensors", filled(net, 0.0))(images), quantized(images))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    mask=st.sampled_from(["none", "causal", "bool", "float", "infinite"]),
    ranks=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_mask(lengths, heads, mask, ranks, seed):
    """Property: whatever the sizes, and whichever axes of the mask are broadcast, blind rows included."""
    (length, keys), (own, shared) = lengths, heads
    generator = torch.Generator().manual_seed(seed)
    shape = [size if kept else 1 for size, kept in zip((own, length, keys), ranks, strict=True)]
    allowed = torch.rand(shape, generator=generator) < 0.6
    masks = {"bool": allowed, "float": torch.randn(shape, generator=generator), "infinite": infinite(allowed)}
    options: dict[str, Any] = {"is_causal": mask == "causal", "enable_gqa": own != shared}
    held = nn.Module()
    if mask in masks:
        held.register_buffer("mask", masks[mask])

    def body(s: Any, x: Tensor) -> Tensor:
        q, k, v = x[:, :, :length], x[:, :shared, :keys], x[:, :shared, -keys:]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=s.held.mask if mask in masks else None, **options)

    model = Net(body, held=held).eval()
    x = torch.randn(3, own, 5, 2, generator=generator)
    new, log = apply(trace(model, x), Canonicalize(), OpenAttention())
    assert log.count == 1
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-6)
