"""Multi-head attention written out in the graph, against the module in eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.passes import OpenAttention
from fxquant.pipeline import Pipeline
from fxquant.tracing import trace
from fxquant.tracing.attention import without_fast_path

N, L, E, HEADS = 2, 6, 8, 2
TOKENS = torch.randn(N, L, E)


class Attend(nn.Module):
    """Calls a `MultiheadAttention` on `[N, L, E]` in one of the ways it can be called."""

    def __init__(self, call: dict[str, Any], inputs: str = "same", **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, HEADS, **options)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.call, self.inputs = call, inputs
        self.key, self.value = nn.LazyLinear(self.attention.kdim), nn.LazyLinear(self.attention.vdim)
        self.key(TOKENS), self.value(TOKENS)

    def forward(self, tokens: Tensor) -> Any:
        query = tokens if self.attention.batch_first else tokens.transpose(0, 1)
        query = tokens.mean(0) if self.inputs == "unbatched" else query
        key = query if self.inputs in {"same", "unbatched"} else self.key(query)
        value = key if self.inputs in {"same", "unbatched", "cross"} else self.value(query)
        masks = {k: m(tokens, query) if callable(m) else m for k, m in self.call.items()}
        return self.attention(query, key, value, **masks)


def check(model: nn.Module, example: Tensor = TOKENS) -> torch.fx.GraphModule:
    traced = trace(model.eval(), example)
    tokens = torch.randn(5, *example.shape[1:])
    with torch.no_grad():
        ours, theirs = (torch.utils._pytree.tree_leaves(m(tokens)) for m in (traced, model))
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert a == b
    opened = Pipeline([OpenAttention()]).run(traced)
    with torch.no_grad():
        torch.testing.assert_close(opened(tokens), traced(tokens), rtol=1e-5, atol=1e-6)
    targets = [node.target for node in opened.graph.nodes]
    assert F.multi_head_attention_forward not in targets
    assert F.scaled_dot_product_attention not in targets
    return opened


LOOK_AHEAD = torch.ones(L, L, dtype=torch.bool).triu(1)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bool mask": {"attn_mask": LOOK_AHEAD},
    "float mask": {"attn_mask": torch.linspace(-1, 1, L * L).view(L, L)},
    "mask per head": {"attn_mask": lambda x, q: x.new_ones(x.shape[0] * HEADS, 1, 1) * torch.linspace(-1, 1, L * L).view(L, L)},
    "padding": {"key_padding_mask": lambda x, q: (x[:, :, 0] > 0) & (torch.arange(L) > 0)},
    "padding and mask": {"key_padding_mask": lambda x, q: (x[:, :, 0] > 0) & (torch.arange(L) > 0), "attn_mask": LOOK_AHEAD},
    "causal": {"attn_mask": LOOK_AHEAD, "is_causal": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "packed": {},
    "no bias": {"bias": False},
    "separate": {"kdim": 4, "vdim": 12},
    "key and value bias": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
}


GRID = [(c, o) for c in CALLS for o in OPTIONS if o in {"packed", "both"} or c in {"plain", "padding and mask"}]


@pytest.mark.parametrize(("call", "options"), GRID)
def test_module(call: str, options: str) -> None:
    inputs = "different" if options == "separate" else "same"
    # The result without weights, which torch computes by another route, and one of the two kinds of weights.
    average = (list(CALLS).index(call) + list(OPTIONS).index(options)) % 2 == 0
    for batch_first, need_weights in ((True, False), (False, True)):
        arguments = CALLS[call] | {"need_weights": need_weights, "average_attn_weights": average}
        check(Attend(arguments, inputs, batch_first=batch_first, **OPTIONS[options]))


BLIND = LOOK_AHEAD.clone()
BLIND[2] = True


@pytest.mark.parametrize("kind", ["bool", "float", "padding"])
def test_queries_that_may_look_at_nothing_give_zeros(kind: str) -> None:
    """As in torch where no weights are asked for, but for its fused path, which gives NaN."""
    masks = {
        "bool": {"attn_mask": BLIND},
        "float": {"attn_mask": torch.zeros(L, L).masked_fill(BLIND, -torch.inf)},
        "padding": {"key_padding_mask": lambda x, q: (x[:, :, 0] > 1e9) | (x[:, :1, 0] > 0)},
    }
    attend = Attend(masks[kind] | {"need_weights": False}, batch_first=True)
    with without_fast_path():
        traced = check(attend)
    assert traced(TOKENS.abs())[0].isfinite().all()


def test_an_encoder_over_an_image_that_is_all_padding() -> None:
    class Encode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, E, 4, 4)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True), 1, enable_nested_tensor=False)
            self.head = nn.Linear(E, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            padding = x.square().mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2)).flatten(1) == 0
            return self.head(self.encoder(tokens, src_key_padding_mask=padding).mean(1))

    torch.manual_seed(0)
    images, net = torch.randn(8, 3, 8, 8), Encode().eval()
    qmodel = fxquant.quantize(net, [images], 8, 8, cat=False, recipe="fast", progress=False)
    images[1] = 0
    with torch.no_grad(), without_fast_path():
        wanted, got = net(images), qmodel(images)
    assert wanted.isfinite().all()
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.05 * wanted.std().item())


@pytest.mark.parametrize("inputs", ["cross", "different", "unbatched"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_inputs(inputs: str, need_weights: bool) -> None:
    traced = check(Attend({"need_weights": need_weights}, inputs, batch_first=True))
    assert sum(node.target is F.linear for node in traced.graph.nodes) == (2 if inputs == "unbatched" else 4)


def test_self_attention_is_two_linears_two_products_and_a_softmax() -> None:
    traced = check(Attend({"need_weights": False}, batch_first=True))
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(F.linear) == 2
    assert targets.count(torch.matmul) == 2
    assert targets.count(F.softmax) == 1
    assert "attention.in_proj_weight" in targets
    assert "attention.out_proj.weight" in targets
    assert not any(node.op == "call_module" for node in traced.graph.nodes)


def test_the_functional_form_is_written_out_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(E, HEADS)

        def forward(self, x: Tensor) -> Tensor:
            m, x = self.inner, x.transpose(0, 1)
            packed = m.in_proj_weight, m.in_proj_bias
            return F.multi_head_attention_forward(
                x, x, x, E, HEADS, *packed, None, None, False, 0.0, m.out_proj.weight, m.out_proj.bias, training=False
            )[0]

    check(Functional())


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layers(norm_first: bool, batch_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=batch_first, norm_first=norm_first, activation=activation)
    traced = check(nn.Sequential(layer), torch.randn(2, L, E) if batch_first else torch.randn(L, 2, E))
    kinds = [type(traced.get_submodule(n.target)) for n in traced.graph.nodes if n.op == "call_module"]
    assert kinds.count(nn.Linear) == 2
    assert kinds.count(nn.LayerNorm) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_with_padding_takes_its_slow_path() -> None:
    class Encode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x: Tensor) -> Tensor:
            padding = (torch.arange(L) >= 4).expand(x.shape[0], L)
            return self.encoder(x, src_key_padding_mask=padding)[:, :4]

    traced = check(Encode())
    assert sum(node.target is F.softmax for node in traced.graph.nodes) == 2


def test_a_causal_encoder() -> None:
    class Encode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True), 1)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(L))

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x, mask=self.mask)

    check(Encode())
