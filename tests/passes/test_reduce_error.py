"""ReduceError: no output of a layer gets worse, what it does not know is named, and the result is a quantized network like any other."""

from __future__ import annotations

import weakref

import pytest
import torch
from nets import Net, apply, images, make, prepared
from test_insert_fake_quant import MINMAX
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant import Recipe
from fxquant.calibration import activation_quantizers, weight_quantizers
from fxquant.erq import sums_of_halves
from fxquant.execution import sweep
from fxquant.graph import called, put_module
from fxquant.passes import CorrectBias, Freeze, InsertFakeQuant, InsertObservers, ReduceError, ReparameterizeNorms
from fxquant.placement import place
from fxquant.quantizers import DualQuantizer
from fxquant.quantizers.layers import QuantizedLayer

BATCHES = [images(12), images(7)]


def quantized(
    name: str | nn.Module, w: int = 3, a: int | None = 4, recipe: Recipe = MINMAX, norms: bool = False
) -> tuple[GraphModule, GraphModule, ReduceError]:
    teacher = prepared(name)
    plan = place(teacher, w, a, "same")
    if norms:
        teacher, _ = apply(teacher, ReparameterizeNorms(plan, BATCHES, recipe))
    observed, _ = apply(teacher, InsertObservers(plan))
    for batch in BATCHES:
        observed(batch)
    gm, _ = apply(observed, InsertFakeQuant(plan, activation_quantizers(recipe), weight_quantizers(recipe)))
    return teacher, gm, ReduceError(teacher, BATCHES, plan, weight_quantizers(recipe), recipe)


def outputs(gm: GraphModule) -> dict[str, Tensor]:
    found = {}
    for node, values in sweep(gm, BATCHES):
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.Linear | nn.Conv2d):
            found[str(node.target)] = torch.cat([v.flatten(0, -2) if v.ndim < 4 else v.movedim(1, -1).flatten(0, -2) for v in values])
    return found


def error(wanted: Tensor, got: Tensor) -> Tensor:
    return (wanted - got).double().square().sum(0)


@pytest.mark.parametrize("w", [2, 3, 8])
@pytest.mark.parametrize("name", ["attention", "linear_norm", "residual", "squeeze_excite"])
def test_layers_come_closer(name, w, untouched):
    teacher, gm, step = quantized(name, w)
    with untouched(gm), untouched(teacher):
        new, log = apply(gm, step)
    layers = [str(node.target) for node, part in called(gm) if isinstance(part, QuantizedLayer)]
    assert log.count + len(log.skipped) == len(layers)
    assert log.notes == ["fitted to 19 images"]
    wanted, before, behind = outputs(teacher), outputs(gm), outputs(new)
    first, last = layers[0], layers[-1]
    assert bool((error(wanted[first], behind[first]) <= error(wanted[first], before[first]) * (1 + 1e-4) + 1e-6).all())
    if w < 8:  # else it is the inputs that err
        assert error(wanted[last], behind[last]).sum() < 0.8 * error(wanted[last], before[last]).sum()


def test_one_layer_never_gets_worse():
    """An output is only taken when it is nearer to the float one than before, whatever its inputs."""
    for seed in range(5):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(768, 6, bias=bool(seed % 2)))
        teacher, gm, step = quantized(net, 2 + seed)
        new, _ = apply(gm, step)
        errors = [error(outputs(teacher)["1"], outputs(graph)["1"]) for graph in (gm, new)]
        assert bool((errors[1] <= errors[0]).all())
        assert errors[1].sum() < errors[0].sum()
        assert new.get_submodule("1").bias is not None


def test_weights_stay_on_their_grid():
    _, gm, step = quantized("attention", 3)
    new, _ = apply(gm, step)
    for (node, old), (_, part) in zip(called(gm), called(new), strict=True):
        if isinstance(part, QuantizedLayer):
            assert torch.equal(part.weight, part.weight_quantizer(part.weight)), node
            assert part.weight_quantizer.spec == old.weight_quantizer.spec
            assert not part.frozen


@pytest.mark.parametrize("name", ["attention", "residual"])
def test_a_frozen_network_is_fitted_too(name, untouched):
    """As one from a file is: the same as if it had not been frozen, and linked again by the next Freeze."""
    teacher, gm, step = quantized(name)
    frozen, _ = apply(gm, Freeze())
    with untouched(frozen):
        new, log = apply(frozen, ReduceError(teacher, BATCHES, step.plan, step.weights, step.recipe))
    assert not log.skipped
    assert any(part.input_scale is not None for _, part in called(frozen) if isinstance(part, QuantizedLayer))
    for path in (str(node.target) for node, part in called(frozen) if isinstance(part, QuantizedLayer)):
        old, part = frozen.get_submodule(path), new.get_submodule(path)
        assert old.frozen and not part.frozen and part.input_scale is None
        assert torch.equal(part.weight, part.weight_quantizer(part.weight))
    wanted, before, behind = outputs(teacher), outputs(frozen), outputs(new)
    first = next(iter(wanted))
    last = list(wanted)[-1]
    assert bool((error(wanted[first], behind[first]) <= error(wanted[first], before[first]) * (1 + 1e-4) + 1e-6).all())
    assert error(wanted[last], behind[last]).sum() < 0.8 * error(wanted[last], before[last]).sum()
    again, _ = apply(new, Freeze())
    for node, part in called(again):
        if isinstance(part, QuantizedLayer):
            old = frozen.get_submodule(str(node.target))
            assert part.frozen and (part.input_scale is None) == (old.input_scale is None)  # None: it reads no grid
    for got, its in zip(outputs(again).values(), behind.values(), strict=True):
        assert (got - its).norm() < 0.05 * its.norm()  # scales of 16 bits are the same; a few values lie on the border of two codes


def two_grids() -> tuple[GraphModule, GraphModule, ReduceError]:
    torch.manual_seed(0)
    members = {"patch": nn.Conv2d(3, 24, 4, 4), "norm": nn.LayerNorm(24), "fc": nn.Linear(24, 40), "head": nn.Linear(40, 5)}
    nn.init.uniform_(members["norm"].weight, 0.2, 3)
    net = Net(lambda s, x: s.head(nn.functional.gelu(s.fc(s.norm(s.patch(x).flatten(2).transpose(1, 2))))), **members).eval()
    return quantized(net, recipe=MINMAX.replace(stages=Recipe.ERQ.stages, weight_groups="dual"), norms=True)


@pytest.mark.parametrize("groups", ["one", "dual"])
@pytest.mark.parametrize("freeze", [False, True])
def test_a_second_run_keeps_two_grids(freeze, groups):
    teacher, gm, step = two_grids()
    once, _ = apply(gm, step)
    assert isinstance(once.fc.weight_quantizer, DualQuantizer)
    once, _ = apply(once, Freeze()) if freeze else (once, None)
    twice, log = apply(once, ReduceError(teacher, BATCHES, step.plan, step.weights, step.recipe.replace(weight_groups=groups)))
    assert not log.skipped
    old, new = once.fc.weight_quantizer, twice.fc.weight_quantizer
    assert isinstance(new, DualQuantizer) and torch.equal(new.outlier, old.outlier)
    wanted, before, behind = outputs(teacher), outputs(once), outputs(twice)
    first = next(iter(wanted))
    assert bool((error(wanted[first], behind[first]) <= error(wanted[first], before[first]) * (1 + 1e-4) + 1e-6).all())
    for path in wanted:
        assert error(wanted[path], behind[path]).sum() <= 1.05 * error(wanted[path], before[path]).sum()


@pytest.mark.parametrize("gain", ["none", "balanced"])
def test_biases_corrected_behind_two_grids(gain):
    teacher, gm, step = two_grids()
    fitted, _ = apply(gm, step)
    corrected, log = apply(fitted, CorrectBias(teacher, BATCHES, gain))
    assert log.count == 3
    assert isinstance(corrected.fc.weight_quantizer, DualQuantizer)
    assert torch.equal(corrected.fc.codes(), fitted.fc.codes())
    wanted, got = outputs(teacher)["fc"], outputs(corrected)["fc"]
    assert (wanted.mean(0) - got.mean(0)).abs().max() < 0.02 * wanted.std()


@pytest.mark.parametrize(
    ("name", "refused"), [("transposed", {"3", "6"}), ("one_dimension", {"layers.0", "layers.3"}), ("mobile", {"b.3", "c.3"})]
)
def test_refusals(name, refused):
    _, gm, step = quantized(name)
    new, log = apply(gm, step)
    assert {where for where, _ in log.skipped} == refused
    assert all("has groups" in why or "no linear layer or 2-D convolution" in why for _, why in log.skipped)
    assert all(new.get_submodule(path) is gm.get_submodule(path) for path in refused)


def test_activations_are_dropped_behind_their_last_reader(monkeypatch):
    """`affordable_images` counts on it: two ops behind a layer, nothing holds what the float one gave or the quantized one read."""
    given, taken, alive = [], [], []

    def spy(layer, axis, read, wanted, sizes):
        given.extend(map(weakref.ref, wanted))
        taken.extend(weakref.ref(value) for value in read if not any(value is batch for batch in BATCHES))
        return sums_of_halves(layer, axis, read, wanted, sizes)

    monkeypatch.setattr("fxquant.passes.reduce_error.sums_of_halves", spy)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.Tanh()
    )
    teacher, gm, step = quantized(net)
    for graph, refs in ((teacher, given), (gm, taken)):
        for path in ("4", "7"):
            part = nn.Tanh()  # graphs share those that no pass changes
            part.register_forward_hook(lambda *_, refs=refs: alive.append(sum(ref() is not None for ref in refs)))
            put_module(graph, path, part)
    apply(gm, step)
    assert len(given) == 3 * len(BATCHES)
    assert len(taken) == 2 * len(BATCHES)
    assert len(alive) >= 3 * len(BATCHES)  # what is behind the last layer does not run in the teacher
    assert not any(alive)


def test_sums_beyond_the_budget_are_refused():
    _, gm, step = quantized("attention", recipe=MINMAX.replace(memory_gib=0.001))
    assert apply(gm, step)[1].skipped == []
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 6))
    _, gm, step = quantized(net, recipe=MINMAX.replace(memory_gib=0.001))
    _, log = apply(gm, step)
    assert [where for where, _ in log.skipped] == ["1"]
    assert "which is beyond memory_gib" in log.skipped[0][1]


@pytest.mark.parametrize(("size", "stride", "padding", "dilation"), [(3, 1, 1, 1), (3, 2, 0, 2), ((1, 3), (2, 1), (0, 1), 1), (4, 4, 0, 1)])
def test_convolutions_are_their_matrices(size, stride, padding, dilation):
    layer = nn.Conv2d(3, 5, size, stride, padding, dilation).double()
    x = images(6, torch.float64)
    y = layer(x).detach()
    one, other = sums_of_halves(layer, 0, [x[:4], x[4:]], [y[:4], y[4:]], [4, 2])
    weight = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).detach()
    assert one.count == other.count == y[:3, 0].numel()
    assert float((one + other).error(weight).sum()) < 1e-9 * float(y.square().sum())


@torch.no_grad()
def test_a_single_image_is_cut_into_tokens():
    for layer, x in ((nn.Linear(4, 3), torch.randn(1, 7, 4)), (nn.Conv2d(2, 3, 1), torch.randn(1, 2, 1, 7))):
        one, other = sums_of_halves(layer, 0, [x], [layer(x)], [1])
        assert (one.count, other.count) == (4, 3)


@torch.no_grad()
@pytest.mark.parametrize("form", ["[N, L, C]", "[L, N, C]", "[N windows, L, C]", "conv"])
def test_halves_hold_whole_images(form):
    """Every token holds the number of its image, so the sums say which images a fold has; batches of one image are no exception."""
    sizes, first, read = (1, 4, 1, 3), 0, []
    for size in sizes:
        numbers = torch.arange(first, first + size).float()
        if form == "conv":
            read.append(numbers.view(-1, 1, 1, 1).expand(-1, 1, 2, 3))
        else:
            windows = 2 if "windows" in form else 1
            tokens = numbers.repeat_interleave(windows).view(-1, 1, 1).expand(-1, 6 // windows, 1)
            read.append(tokens.transpose(0, 1) if form == "[L, N, C]" else tokens)
        first += size
    layer = nn.Conv2d(1, 1, 1) if form == "conv" else nn.Linear(1, 1)
    even, odd = sums_of_halves(layer, int(form == "[L, N, C]"), read, [layer(x) for x in read], sizes)
    assert (even.count, odd.count) == (6 * 5, 6 * 4)
    assert even.a[0, 0] == 6 * (0 + 4 + 16 + 36 + 64)
    assert odd.a[0, 0] == 6 * (1 + 9 + 25 + 49)


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_of_one_image(count):
    """A remainder of one image, and one image alone, also behind convolutions."""
    fxquant.quantize(make("residual"), [images(2)] * (count // 2) + [images(1)], 3, 4, recipe="erq", cat=False, progress=False)


def test_images_along_another_axis_are_found():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.mix, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.patches(x).flatten(2).permute(2, 0, 1)).relu().mean(0))

    torch.manual_seed(0)
    _, gm, step = quantized(Sequence().eval())
    seen: list[int] = []

    def seeing(layer, axis, *rest):
        seen.append(axis)
        return sums_of_halves(layer, axis, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxquant.passes.reduce_error.sums_of_halves", seeing)
        apply(gm, step)
    assert seen == [0, 1, 0]


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_the_recipe(tmp_path, name):
    net = make(name)
    qmodel = fxquant.quantize(net, BATCHES, 3, 4, recipe="erq", progress=False)
    plain = fxquant.quantize(net, BATCHES, 3, 4, recipe=Recipe(stages=("ranges",)), progress=False)
    with torch.no_grad():
        wanted = net(BATCHES[0])
        errors = [(network(BATCHES[0]) - wanted).norm() for network in (qmodel, plain)]
    assert name == "attention" or errors[0] < 0.7 * errors[1]  # which has sums of random tokens that no layer can mend
    assert "reduce_error" in str(fxquant.report(qmodel))
    fxquant.save(qmodel, tmp_path / "q.safetensors")
    assert torch.equal(fxquant.load(tmp_path / "q.safetensors", make(name))(BATCHES[0]), qmodel(BATCHES[0]))
    again = fxquant.quantize(net, BATCHES, 3, 4, recipe="erq", progress=False)
    assert torch.equal(again(BATCHES[0]), qmodel(BATCHES[0]))


def test_fewer_tokens_than_columns():
    net = make("linear_norm")
    few = [images(2)]
    qmodel = fxquant.quantize(net, few, 4, 4, recipe="erq", cat=False, progress=False)
    assert bool(qmodel(images(5)).isfinite().all())


def constant_channels(x: Tensor) -> Tensor:
    """Two channels with the same number everywhere: their columns, and those of the bias, are multiples of each other."""
    return torch.cat([x[:, :1], torch.full_like(x[:, :1], 0.5), torch.full_like(x[:, :1], -2)], 1)


def equal_channels(x: Tensor) -> Tensor:
    return x[:, :1].expand(-1, 3, -1, -1).contiguous()


def transformer(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), norm, nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 5)).eval()


@pytest.mark.parametrize("name", ["attention", "linear_norm", "residual"])
@pytest.mark.parametrize("make_images", [constant_channels, equal_channels, torch.zeros_like], ids=lambda f: f.__name__)
def test_singular_sums(name, make_images):
    batches = [make_images(batch) for batch in BATCHES]
    qmodel = fxquant.quantize(make(name), batches, 4, 4, recipe="erq", cat=False, progress=False)
    for network in (qmodel, fxquant.quantize(make(name), batches, 3, 3, recipe="erq", cat=False, edges="same", progress=False)):
        assert bool(network(images(5)).isfinite().all())
        assert all(bool(value.isfinite().all()) for value in network.state_dict().values())


def test_a_norm_without_weight_and_bias():
    """It cannot take the scales, says so, and everything else goes on."""
    net = transformer(nn.LayerNorm(16, elementwise_affine=False))
    qmodel = fxquant.quantize(net, BATCHES, 4, 4, recipe="erq", cat=False, progress=False)
    logs = {log.name: log for log in fxquant.report(qmodel).record.passes}
    assert logs["reparameterize_norms"].count == 0
    assert ["has no weight and bias of its own" in why for _, why in logs["reparameterize_norms"].skipped] == [True]
    assert logs["reduce_error"].count == 3
    plain = fxquant.quantize(net, BATCHES, 4, 4, recipe=Recipe(stages=("ranges",)), progress=False)
    x = torch.cat(BATCHES)
    with torch.no_grad():
        assert (qmodel(x) - net(x)).norm() < (plain(x) - net(x)).norm()
