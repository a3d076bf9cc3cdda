"""Networks with attention of every make: opened, every operand of every product quantized, and close to float at 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from nets import images as some_images
from nets import make, ops, prepared
from timm.models import cait, maxxvit
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant import Recipe, trace
from fxquant.errors import CalibrationError, ModelError
from fxquant.graph import called
from fxquant.kinds import WEIGHTED, kind
from fxquant.passes import PREPARE
from fxquant.pipeline import Pipeline
from fxquant.placement import operands, place, source
from fxquant.quantizers import LogQuantizer, UniformQuantizer

TOKENS, WIDTH = 16, 12


class Around(nn.Module):
    """Patches of an image, an attention or encoder layer between, a classifier."""

    def __init__(self, middle: nn.Module, call: Callable[[nn.Module, Tensor], Any] = lambda middle, x: middle(x)):
        super().__init__()
        self.patch, self.middle, self.fc, self.call = nn.Conv2d(3, WIDTH, 4, 4), middle, nn.Linear(WIDTH, 5), call

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.fc((x + self.call(self.middle, x)).mean(1))


def multihead(call: Callable[[nn.Module, Tensor], Any], **options: Any) -> nn.Module:
    return Around(nn.MultiheadAttention(WIDTH, 3, **{"batch_first": True, **options}), lambda m, x: call(m, x)[0])


AHEAD = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
PADDED = torch.arange(TOKENS) >= 11


def first_axis(m: nn.Module, x: Tensor) -> tuple[Tensor]:
    x = x.transpose(0, 1)
    return (m(x, x, x, need_weights=False)[0].transpose(0, 1),)


def encoder(**options: Any) -> nn.Module:
    return Around(nn.TransformerEncoderLayer(WIDTH, 3, 24, **{"batch_first": True, **options}))


class RelativePosition(nn.Module):
    """MaxViT's attention within a window: a bias out of a table for each pair of places, as a mask of the fused function."""

    def __init__(self, side: int = 4, heads: int = 3):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = (place[:, :, None] - place[:, None]) + side - 1
        self.register_buffer("index", apart[0] * (2 * side - 1) + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(n, t, c))


def vision_transformer() -> nn.Module:
    net = zoo.VisionTransformer(image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(net.heads.head.weight, std=0.5)
    return net


def swin(version: int) -> nn.Module:
    options: dict[str, Any] = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": [4, 4]}
    if version == 1:
        return zoo.SwinTransformer(**options, num_classes=5)
    blocks = {"block": zoo.swin_transformer.SwinTransformerBlockV2, "downsample_layer": zoo.swin_transformer.PatchMergingV2}
    return zoo.SwinTransformer(**options, num_classes=5, **blocks)


def maxvit(fused: bool) -> nn.Module:
    attention = maxxvit.MaxxVitTransformerCfg(dim_head=4, window_size=(2, 2), rel_pos_type="bias")
    settings = maxxvit.MaxxVitCfg(embed_dim=(8, 12), depths=(1, 1), block_type=("M", "M"), stem_width=8, transformer_cfg=attention)
    net = maxxvit.MaxxVit(settings, img_size=16, num_classes=5)
    for module in net.modules():
        if isinstance(module, maxxvit.AttentionCl | maxxvit.Attention2d):
            module.fused_attn = fused
    return net


def class_attention(fused: bool) -> nn.Module:
    net = cait.Cait(img_size=16, patch_size=4, embed_dim=WIDTH, depth=1, num_heads=3, num_classes=5, init_values=0.5, depth_token_only=1)
    for module in net.modules():
        if isinstance(module, cait.ClassAttn):
            module.fused_attn = fused
    return net


def timm_vit(**options: Any) -> nn.Module:
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": WIDTH, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(**{**settings, **options})


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "multihead": (lambda: multihead(lambda m, x: m(x, x, x)), 1),
    "multihead, bool mask": (lambda: multihead(lambda m, x: m(x, x, x, attn_mask=AHEAD)), 1),
    "multihead, float mask": (lambda: multihead(lambda m, x: m(x, x, x, attn_mask=torch.linspace(-1, 1, 256).view(16, 16))), 1),
    "multihead, padding": (lambda: multihead(lambda m, x: m(x, x, x, key_padding_mask=PADDED.expand(x.shape[0], -1))), 1),
    "multihead, causal": (lambda: multihead(lambda m, x: m(x, x, x, attn_mask=AHEAD, is_causal=True, need_weights=False)), 1),
    "multihead, dropout": (lambda: multihead(lambda m, x: m(x, x, x), dropout=0.5), 1),
    "multihead, other keys": (lambda: multihead(lambda m, x: m(x, x[:, :7] * 2, x[:, :7])), 1),
    "multihead, batch second": (lambda: multihead(first_axis, batch_first=False), 1),
    "encoder layer": (encoder, 1),
    "encoder layer, norm first": (lambda: encoder(norm_first=True, activation="gelu"), 1),
    "relative position": (lambda: Around(RelativePosition()), 1),
    "torchvision vit": (vision_transformer, 2),
    "torchvision swin": (lambda: swin(1), 3),
    "torchvision swin v2": (lambda: swin(2), 3),
    "timm vit": (timm_vit, 2),
    "timm vit, norms of q and k": (lambda: timm_vit(qk_norm=True, init_values=0.5), 2),
    "timm maxvit": (lambda: maxvit(True), 4),
    "timm maxvit, not fused": (lambda: maxvit(False), 4),
    "timm cait": (lambda: class_attention(True), 2),
    "timm cait, not fused": (lambda: class_attention(False), 2),
}
"""How each is built, and how many attentions it has."""


def built(name: str) -> tuple[nn.Module, int]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, count = NETWORKS[name][0](), NETWORKS[name][1]
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.normal_(head.weight, std=0.5)
        return net.eval(), count


def smooth(count: int, size: int = 16, seed: int = 0) -> Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bilinear")


def quantize(net: nn.Module, w: int = 8, a: int = 8, **options: Any) -> GraphModule:
    return fxquant.quantize(net, [smooth(16)], w, a, **{"recipe": "fast", "cat": False, "progress": False, **options})


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0))


SLOW = ("timm maxvit, not fused", "timm cait, not fused")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS])
def test_network(name):
    """Traced, opened, planned and quantized: nothing of it stays fused, and no product reads a float."""
    net, attentions = built(name)
    teacher = Pipeline([step() for step in PREPARE]).run(trace(net, smooth(2)))
    x = smooth(3, seed=1)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(teacher(x), expected, rtol=1e-3, atol=1e-5)
    found = ops(teacher)
    assert (found["attention"], found["softmax"]) == (0, attentions)
    assert not [node for node in teacher.graph.nodes if node.op == "call_function" and kind(node) in WEIGHTED], "a weight is computed"

    plan = place(teacher, 8, 8)
    assert sum(tensor.softmax for tensor in plan.tensors.values()) == attentions
    for node in teacher.graph.nodes:
        if kind(node) != "matmul":
            continue
        for operand in operands(node):
            near = operand
            while near.name not in plan.tensors and near is not source(operand):
                near = near.args[0]
            assert near.name in plan.tensors, f"{node} reads {near} in float"
            assert node.name in plan.tensors[near.name].readers
            assert plan.tensors[near.name].softmax == (kind(source(near)) == "softmax")
    assert all(layer.a is not None for layer in plan.layers.values() if layer.kind == "matmul")

    quantized = quantize(net)
    with torch.no_grad():
        assert cosine(quantized(x), expected) >= 0.99


@pytest.mark.parametrize("build", [vision_transformer, timm_vit])
def test_another_image_size_is_refused(build):
    """The positions of a vision transformer are stored for one size, and its graph is made for that one."""
    net = build().eval()
    with pytest.raises(CalibrationError, match=r"fails on images of shape \[3, 24, 24\].* the size that the network was built for"):
        fxquant.quantize(net, [smooth(4, 24)], 8, 8, recipe="fast", progress=False)
    with pytest.raises(CalibrationError, match=r"has images of shape \[3, 24, 24\], the graph was traced for \[3, 16, 16\]"):
        fxquant.quantize(trace(net, smooth(2)), [smooth(4, 24)], 8, 8, recipe="fast", progress=False)
    quantized = quantize(net)
    with pytest.raises(ModelError, match=r"^images: are of shape \[3, 24, 24\], and the graph holds for \[3, 16, 16\] alone"):
        quantized(smooth(2, 24))


def test_norms_without_weights_are_left_alone_by_erq():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(WIDTH, elementwise_affine=False), RelativePosition()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.norm(x))

    torch.manual_seed(0)
    net = Around(Plain()).eval()
    quantized = quantize(net, recipe="erq")
    logs = {log.name: log for log in fxquant.report(quantized).record.passes}
    assert logs["reparameterize_norms"].count == 0
    assert logs["reparameterize_norms"].skipped == [("middle.norm", "has no weight and bias of its own to take the scales and zero-points")]
    x = smooth(3, seed=1)
    assert cosine(quantized(x), net(x)) >= 0.99


HEADS = Recipe.FAST.replace(matmul_scales="head")


@pytest.fixture(scope="module")
def by_head() -> GraphModule:
    return quantize(make("fused_attention"), 8, 8, recipe=HEADS)


def scales(gm: GraphModule) -> dict[str, int]:
    return {
        str(node.target).removeprefix("activations."): module.scale.numel()
        for node, module in called(gm)
        if isinstance(module, UniformQuantizer | LogQuantizer)
    }


def test_a_scale_a_head(by_head):
    found = scales(by_head)
    assert found == {"norm": 1, "mul": 2, "transpose_2": 2, "softmax": 2, "getitem_2": 2, "matmul_1": 1, "add": 1}
    net, x = make("fused_attention"), some_images(4)
    assert cosine(by_head(x), net(x)) >= 0.999
    module = by_head.get_submodule("activations.getitem_2")
    teacher = prepared("fused_attention")
    values = torch.fx.Interpreter(teacher, garbage_collect_values=False)
    values.run(smooth(16))
    value = next(value for node, value in values.env.items() if node.name == "getitem_2")
    for head in range(2):
        reach = value[:, head].aminmax()
        codes = module.spec.levels - 1
        assert float(module.scale[head]) == pytest.approx(float(reach.max - reach.min) / codes, rel=0.1)


@pytest.mark.parametrize("grid", ["log2", "logsqrt2"])
def test_a_logarithmic_scale_a_head(grid, tmp_path):
    quantized = quantize(make("fused_attention"), 4, 4, recipe=HEADS.replace(softmax_quantizer=grid))
    module = quantized.get_submodule("activations.softmax")
    assert isinstance(module, LogQuantizer) and module.scale.shape == (2,) and "per index of axis 1" in str(module)
    fxquant.save(quantized, tmp_path / "file")
    again = fxquant.load(tmp_path / "file", make("fused_attention"))
    assert torch.equal(quantized(some_images()), again(some_images()))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_heads_go_through_a_file(bits, tmp_path):
    quantized = quantize(make("fused_attention"), bits, bits, recipe=HEADS, edges="same")
    fxquant.save(quantized, tmp_path / "file")
    again = fxquant.load(tmp_path / "file", make("fused_attention"))
    assert torch.equal(quantized(some_images(5)), again(some_images(5)))
    assert scales(again) == scales(quantized)
    assert fxquant.report(again).to_dict() == fxquant.report(quantized).to_dict()
    assert fxquant.report(again).record.plan.tensors["softmax"].axis == 1


def test_heads_compile_in_one_graph(by_head):
    compiled = torch.compile(by_head, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(some_images()), by_head(some_images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("w", "a", "clip"), [(8, 8, False), (3, 3, True), pytest.param(4, 4, False, marks=pytest.mark.slow)])
def test_heads_in_onnx(w, a, clip, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    quantized = quantize(make("fused_attention"), w, a, recipe=HEADS, edges="same")
    result = fxquant.export_onnx(quantized, tmp_path / "model.onnx", clip=clip, images=some_images(4))
    assert result.path.exists()
    model = onnx.load(tmp_path / "model.onnx")
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert sizes["activations.softmax.scale"] == [2] and sizes["activations.norm.scale"] == []
    axes = {
        node.input[1]: [attribute.i for attribute in node.attribute if attribute.name == "axis"]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    assert axes["activations.softmax.scale"] == [1]


def test_lowering_says_why_products_stay_simulated(by_head):
    lowered = fxquant.lower(by_head)
    if not fxquant.report(lowered).record.lowered:
        pytest.skip("this machine has no integer kernels")
    (log,) = (log for log in fxquant.report(lowered).record.passes if log.name == "lower_integer")
    reasons = dict(log.skipped)
    assert {reasons["matmul"], reasons["matmul_1"]} == {"multiplies two tensors, the products are of floats"}
    assert cosine(lowered(some_images()), by_head(some_images())) > 0.999


@pytest.mark.parametrize("recipe", ["qdrop", "output_kl", "finish", "pdquant"])
def test_scales_a_head_are_learned(recipe):
    short = {"unit_iterations": 4, "output_kl_iterations": 4, "finish_iterations": 4, "finish_checks": 1, "unit_correction_iterations": 1}
    quantized = quantize(make("fused_attention"), 4, 4, recipe=Recipe.named(recipe).replace(matmul_scales="head", **short))
    assert scales(quantized)["softmax"] == 2
    assert quantized(some_images()).isfinite().all()
