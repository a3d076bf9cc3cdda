"""fxquant.lower and fxquant.compile, as a user calls them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from nets import NETS, make
from nets import images as small_images
from torch import nn

import fxquant
from fxquant import execution
from fxquant.deploy import cpu, cuda
from fxquant.deploy.bytes import Quantize
from fxquant.deploy.compiled import parts_of
from fxquant.deploy.cpu import CpuIntegerLayer
from fxquant.deploy.integers import Grid
from fxquant.errors import ConfigError, FxquantWarning, ModelError
from fxquant.kinds import kind
from fxquant.networks import build
from fxquant.placement import EDGES
from fxquant.quantizers import LogQuantizer, UniformQuantizer
from fxquant.tree import tensors_of

needs_vnni = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

OTHERS = [name for name in NETS if name not in ("residual", "several_outputs", "one_dimension")]  # the last has nothing to lower
COMPILED = ["residual", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.fixture(scope="module")
def calibration() -> list[torch.Tensor]:
    return [small_images(16), small_images(8)]


@pytest.fixture(scope="module")
def simulation(calibration):
    return fxquant.quantize(make("residual"), calibration, 4, 4, False, recipe="fast", progress=False)


def assert_same(lowered: nn.Module, simulation: nn.Module) -> None:
    """Equal up to the rounding of what is summed in floats."""
    x = small_images(32)
    with torch.no_grad():
        y, z = simulation(x), lowered(x)
    assert ((y - z).abs().amax(1) < 1e-5 * y.abs().max()).all()


@needs_vnni
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_the_bytes_are_the_codes_of_the_simulation(calibration, name, bits):
    """At every quantizer, to the bit: both sum integers, and round alike."""
    simulation = fxquant.quantize(make(name), calibration, bits, bits, False, recipe="fast", edges="integer", progress=False)
    lowered, x = fxquant.lower(simulation), small_images(9)
    made = [value for value, module in values_of(lowered, x) if isinstance(module, CpuIntegerLayer | Quantize)]
    made = [value for value in made if value.dtype == torch.uint8]
    codes = [Grid.of(module).quantize(value) for value, module in values_of(simulation, x) if isinstance(module, UniformQuantizer)]
    assert len(made) == len(codes) >= 6
    for mine, theirs in zip(made, codes, strict=True):
        assert torch.equal(mine, theirs)


@torch.no_grad()
def values_of(gm: torch.fx.GraphModule, x: torch.Tensor) -> list[tuple[torch.Tensor, nn.Module]]:
    """Return what every module gives, in order."""
    interpreter = torch.fx.Interpreter(gm)
    interpreter.garbage_collect_values = False
    interpreter.run(x)
    return [(interpreter.env[node], gm.get_submodule(node.target)) for node in gm.graph.nodes if node.op == "call_module"]


@needs_vnni
def test_lowered(simulation, untouched):
    with untouched(simulation):
        lowered = fxquant.lower(simulation)
    assert isinstance(lowered, torch.fx.GraphModule)
    assert not lowered.training
    assert sum(isinstance(module, CpuIntegerLayer) for module in lowered.modules()) >= 5
    for count in (1, 5, 33):
        torch.testing.assert_close(lowered(small_images(count)), simulation(small_images(count)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(lowered)(small_images(3)), lowered(small_images(3)))


@needs_vnni
def test_cat_stays_at_the_end(calibration):
    net = make("residual")
    simulation = fxquant.quantize(net, calibration, 2, 2, False, recipe="fast", progress=False)
    simulation = fxquant.append_cat(simulation, net, calibration, fit="kl", clusters=3, progress=False)
    lowered = fxquant.lower(simulation)
    assert "cat" in dict(lowered.named_children())
    torch.testing.assert_close(lowered(small_images(9)), simulation(small_images(9)), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fxquant.compile(lowered)(small_images(9)), simulation(small_images(9)), rtol=1e-4, atol=1e-4)


@needs_vnni
def test_half_precision_images_and_other_sizes(simulation):
    lowered = fxquant.lower(simulation)
    assert lowered(small_images(2).half()).dtype == torch.float32
    torch.testing.assert_close(lowered(small_images(2).bfloat16()), lowered(small_images(2).bfloat16().float()))
    large = torch.randn(2, 3, 40, 24)
    torch.testing.assert_close(lowered(large), simulation(large), rtol=1e-4, atol=1e-4)


@needs_vnni
@pytest.mark.slow
def test_other_sizes_compiled(simulation):
    """The kernels of one image work shapes out in C++, and oneDNN's weights were packed for those of the calibration."""
    lowered = fxquant.lower(simulation)
    compiled = fxquant.compile(lowered)
    for size in ((16, 16), (40, 24), (7, 30)):
        for count in (1, 3):
            x = torch.randn(count, 3, *size)
            torch.testing.assert_close(compiled(x), lowered(x), rtol=1e-4, atol=1e-4)


@needs_vnni
def test_what_was_done_is_in_the_report(simulation):
    lowered = fxquant.lower(simulation)
    text = str(fxquant.report(lowered))
    assert "lower_integer" in text
    assert "reads x, which is not quantized" in text
    assert "lower_integer" not in str(fxquant.report(simulation))
    assert [fxquant.report(network).to_dict()["lowered"] for network in (lowered, simulation)] == ["cpu", ""]


@needs_vnni
def test_a_lowered_network_is_no_simulation(simulation, tmp_path):
    lowered = fxquant.lower(simulation)
    for call in (fxquant.lower, lambda network: fxquant.save(network, tmp_path / "a.safetensors")):
        with pytest.raises(ModelError, match="is lowered to integers"):
            call(lowered)
    assert list(tmp_path.iterdir()) == []


@needs_vnni
@pytest.mark.parametrize("edges", sorted(EDGES))
@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_whatever_the_edges(calibration, name, edges):
    simulation = fxquant.quantize(make(name), calibration, 4, 4, False, recipe="fast", edges=edges, progress=False)
    assert_same(fxquant.lower(simulation), simulation)


@needs_vnni
@pytest.mark.parametrize("bits", [2, 8])
def test_signed_activations(calibration, bits):
    recipe = fxquant.Recipe.FAST.replace(activation_symmetric=True)
    simulation = fxquant.quantize(make("mobile"), calibration, bits, bits, False, recipe=recipe, edges="integer", progress=False)
    lowered = fxquant.lower(simulation)
    assert_same(lowered, simulation)
    assert any(module.input.zero_point >= 2 ** (bits - 1) for module in lowered.modules() if isinstance(module, CpuIntegerLayer))


@needs_vnni
@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "shufflenet_v2_x0_5"),
        ("torchvision", "squeezenet1_1"),
        ("torchvision", "densenet121"),
        ("torchvision", "googlenet"),
        ("timm", "mobilenetv3_small_100"),
        ("timm", "convnext_atto"),
        ("timm", "repvgg_a0"),
        ("timm", "ghostnet_100"),
    ],
)
def test_real_networks(library, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(name, library).model
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    recipe = fxquant.Recipe.FAST.replace(stages=("ranges",), weight_range="minmax", activation_range="minmax")
    simulation = fxquant.quantize(network, [images], 8, 8, False, recipe=recipe, edges="integer", progress=False)
    lowered = fxquant.lower(simulation)
    assert fxquant.report(lowered).record.passes[-1].count > 20
    with torch.no_grad():
        y, z = simulation(images), lowered(images)
    assert (y - z).abs().max() < 1e-4 * (y.max() - y.min())
    assert torch.equal(y.argmax(1), z.argmax(1))


@needs_vnni
def test_lowered_after_loading(simulation, tmp_path):
    fxquant.save(simulation, tmp_path / "a.safetensors")
    loaded = fxquant.load(tmp_path / "a.safetensors", make("residual"))
    assert torch.equal(fxquant.lower(loaded)(small_images(4)), fxquant.lower(simulation)(small_images(4)))


@needs_vnni
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, calibration):
    """Equal to eager mode, without a break; torch makes one graph for one image, and two for more where a float convolution without
    stride is left: its choice of kernel depends on whether there are 16."""
    simulation = fxquant.quantize(make(name), calibration, 4, 4, False, recipe="fast", progress=False)
    lowered = fxquant.lower(simulation)
    compiled = fxquant.compile(lowered)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for count in (4, 8, 1, 15, 64, 3):
        x = small_images(count)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), lowered(x), rtol=1e-4, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 3


@needs_vnni
def test_two_graphs_for_all_batches(calibration):
    simulation = fxquant.quantize(make("chain"), calibration, 4, 4, False, recipe="fast", progress=False)
    compiled = fxquant.compile(fxquant.lower(simulation))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for count in (4, 8, 1, 64, 17, 2):
        compiled(small_images(count))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(("most", "threads", "parts"), [(2, 1, [4, 4, 4]), (7, 1, [6, 6]), (2, 2, [6, 6]), (13, 1, [12]), (12, 2, [12])])
def test_large_batches_run_in_parts(simulation, monkeypatch, most, threads, parts):
    monkeypatch.setattr(torch, "compile", lambda network, **given: network)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(execution, "LARGEST_VALUE", most * largest_of(simulation))
    monkeypatch.setattr("fxquant.deploy.compiled.BYTES_PER_WEIGHT", 0)
    seen, x = [], small_images(12)
    compiled = fxquant.compile(simulation)
    compiled._run.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    assert torch.equal(compiled(x), simulation(x))
    assert seen == parts


def largest_of(gm) -> float:
    return max(map(execution.copied_bytes_per_image, gm.graph.nodes))


def test_parts_are_large_enough_to_be_worth_reading_the_weights_again(monkeypatch):
    monkeypatch.setattr(execution, "LARGEST_VALUE", 1)
    parts = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    nets = [nn.Sequential(*parts, nn.Linear(4, width), nn.Linear(width, 10)) for width in (4, 10_000)]
    few, many = (fxquant.compile(fxquant.trace(net.eval(), small_images(4)))._most for net in nets)
    assert few < many < 1000


@needs_vnni
def test_bytes_leave_the_caches_later_than_floats(calibration, monkeypatch):
    simulation = fxquant.quantize(make("residual"), calibration, 4, 4, False, recipe="fast", edges="integer", progress=False)
    lowered = fxquant.lower(simulation)
    largest = 8 * 16 * 16  # bytes of the first layer's output; an image has 12 * 16 * 16
    assert largest_of(simulation) == 4 * largest and largest_of(lowered) == 1.5 * largest
    monkeypatch.setattr(execution, "LARGEST_VALUE", 120 * largest)
    monkeypatch.setattr("fxquant.deploy.compiled.BYTES_PER_WEIGHT", 0)
    assert [fxquant.compile(network)._most for network in (simulation, lowered)] == [30, 80]
    layers = [module for module in lowered.modules() if isinstance(module, CpuIntegerLayer)]
    for layer in layers:
        layer.bytes = 10**6
    monkeypatch.setattr("fxquant.deploy.compiled.BYTES_PER_WEIGHT", 8)
    assert fxquant.compile(lowered)._most > 1000


def test_no_part_is_longer_than_asked_and_all_are_on_one_side_of_sixteen():
    for most in range(4, 40):
        for count in range(1, 200):
            sizes = [len(part) for part in torch.arange(count).tensor_split(parts_of(count, most))]
            assert sum(sizes) == count and min(sizes) >= 1 and max(sizes) <= most
            assert (min(sizes) >= 16) == (max(sizes) >= 16)
            assert len(sizes) <= max(-(-count // most), -(-count // 15))


class Turned(nn.Sequential):
    """Logits with a column an image."""

    def forward(self, x):
        return super().forward(x).t()


def test_what_has_no_traced_sizes_or_returns_no_logits_runs_whole(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **given: network)
    monkeypatch.setattr(execution, "LARGEST_VALUE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = small_images(12)
    several, turned = fxquant.trace(make("several_outputs"), x), fxquant.trace(Turned(make("chain")).eval(), x)
    for network in (make("residual"), torch.fx.symbolic_trace(make("chain")), several, turned):
        compiled, seen = fxquant.compile(network.eval()), []
        compiled._run.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(len(given[0])))
        compiled(x)
        assert seen == [12]


@pytest.mark.slow
def test_parts_compiled(simulation, monkeypatch):
    monkeypatch.setattr(execution, "LARGEST_VALUE", 1)
    monkeypatch.setattr("fxquant.deploy.compiled.BYTES_PER_WEIGHT", 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, seen = fxquant.compile(simulation), []
    monkeypatch.setattr(compiled, "_whole", lambda part, whole=compiled._whole: (seen.append(len(part)), whole(part))[1])
    for count, wanted in ((10, [4, 3, 3]), (4, [4]), (9, [3, 3, 3])):
        x = small_images(count).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(compiled(x), simulation(x), rtol=1e-4, atol=1e-4)
        assert seen == wanted
        seen.clear()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_vnni
def test_networks_of_one_form_are_compiled_apart(calibration):
    """Modules of a class by what they hold, graphs by their code, for nothing looks into these when they are called."""
    nets = [make("chain") for _ in range(2)]
    torch.nn.init.normal_(next(nets[1].parameters()))
    lowered = [fxquant.lower(fxquant.quantize(net, calibration, 4, 4, False, recipe="fast", progress=False)) for net in nets]
    for pair in (nets, lowered):
        compiled = [fxquant.compile(net) for net in pair]
        for net, fast in zip(pair, compiled, strict=True):
            assert_compiled(fast, net)


def test_a_graph_that_was_changed_is_compiled_anew():
    gm = fxquant.trace(make("chain"), small_images(2))
    compiled = fxquant.compile(gm)
    assert_compiled(compiled, gm)
    before = compiled(small_images(4))
    layer = gm.get_submodule("0")
    for change in (lambda: nn.init.normal_(layer.weight), lambda: setattr(layer, "weight", nn.Parameter(2 * layer.weight))):
        change()
        assert_compiled(fxquant.compile(gm), gm)
        assert_compiled(torch.compile(gm), gm)
    assert torch.equal(compiled(small_images(4)), before), "what was compiled stays"


@torch.no_grad()
def assert_compiled(compiled, network) -> None:
    torch.testing.assert_close(compiled(small_images(4)), network(small_images(4)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_float_networks_and_simulations(simulation):
    for network in (make("residual"), simulation):
        with torch.no_grad():
            torch.testing.assert_close(fxquant.compile(network)(small_images(4)), network(small_images(4)), rtol=1e-4, atol=1e-4)


def test_unknown_backend(simulation):
    with pytest.raises(ConfigError, match="did you mean 'cpu'"):
        fxquant.lower(simulation, backend="cpuu")


def test_a_float_network():
    with pytest.raises(ModelError, match="carries no record"):
        fxquant.lower(make("residual"))


@needs_vnni
@pytest.mark.parametrize("bits", [(None, 8), (8, None)])
def test_nothing_to_lower(bits, calibration):
    simulation = fxquant.quantize(make("residual"), calibration, *bits, False, recipe="fast", progress=False)
    with pytest.raises(ModelError, match=r"has nothing to lower \(.*w=8, a=8"):
        fxquant.lower(simulation)


def test_double_precision(calibration):
    network = make("residual").double()
    simulation = fxquant.quantize(network, [batch.double() for batch in calibration], 4, 4, False, recipe="fast", progress=False)
    with pytest.raises(ModelError, match="float64"):
        fxquant.lower(simulation)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_machine_that_cannot_keeps_the_simulation(simulation, backend, monkeypatch):
    monkeypatch.setattr({"cpu": cpu, "cuda": cuda}[backend], "unavailable", lambda: "it is a toaster")
    with pytest.warns(FxquantWarning, match="the simulation comes back, in floats: it is a toaster"):
        lowered = fxquant.lower(simulation, backend)
    assert torch.equal(lowered(small_images(3)), simulation(small_images(3)))
    assert lowered is not simulation and not lowered.training
    assert "the network: it is a toaster" in str(fxquant.report(lowered))
    assert "toaster" not in str(fxquant.report(simulation))
    halves = small_images(3).bfloat16()
    assert torch.equal(lowered(halves), simulation(halves.float()))
    compiled = torch.compile(lowered, fullgraph=True, backend="eager")  # what a server does next
    assert torch.equal(compiled(small_images(3)), simulation(small_images(3)))


def test_packed_weights_are_for_cuda(simulation, monkeypatch):
    with pytest.raises(ConfigError, match=r"pack: backend 'cpu' has kernels for bytes alone. Use pack=False"):
        fxquant.lower(simulation, pack=True)
    made = []
    monkeypatch.setattr(cuda, "unavailable", lambda *_: None)
    monkeypatch.setattr(cuda, "CudaBackend", lambda **options: made.append(options) or cpu.CpuBackend())
    monkeypatch.setattr(torch.fx.GraphModule, "to", lambda self, *_: self)
    for pack in (False, True):
        fxquant.lower(simulation, "cuda", pack=pack)
    assert made == [{"pack": False}, {"pack": True}]


@needs_vnni
@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 4, 16, 16), torch.zeros(3, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)],
    ids=["four channels", "no batch", "bytes"],
)
def test_images_of_another_form_are_refused_by_name(simulation, x):
    with pytest.raises(ModelError, match=r"^images: are \w+ of shape \[.*\]. Pass a batch of normalized images, floats \[N, 3, H, W\]"):
        fxquant.lower(simulation)(x)


@needs_vnni
def test_images_of_another_form_are_refused_where_compiled(simulation):
    with pytest.raises(Exception, match=r"images are of shape \[2, 4, 16, 16\], and the network takes floats \[N, 3, H, W\]"):
        torch.compile(fxquant.lower(simulation), fullgraph=True, backend="eager")(torch.zeros(2, 4, 16, 16))


@needs_vnni
def test_module_wrappers_are_seen_through(simulation):
    assert isinstance(fxquant.lower(nn.DataParallel(simulation)), torch.fx.GraphModule)


@needs_vnni
def test_integer_edges_leave_no_layer_in_floats(calibration):
    simulation = fxquant.quantize(make("residual"), calibration, 4, 4, False, recipe="fast", progress=False, edges="integer")
    lowered = fxquant.lower(simulation)
    assert fxquant.report(lowered).record.passes[-1].skipped == []
    assert not any(isinstance(module, nn.Conv2d) for module in lowered.modules())
    assert not any(kind(node) == "add" for node in lowered.graph.nodes), "sums of two layers are calls on bytes"
    assert sum(isinstance(module, CpuIntegerLayer) and module.residual is not None for module in lowered.modules()) == 2
    assert not [note for note in fxquant.report(lowered).record.passes[-1].notes if note.startswith("computed in floats")]
    assert_same(lowered, simulation)


@needs_vnni
@pytest.mark.parametrize("grid", ["log2", "logsqrt2"])
def test_logarithmic_softmaxes_stay_simulated(calibration, grid):
    """A logarithmic grid has no bytes; the matmul behind it says why it stays, the layers around it run on integers all the same."""
    recipe = fxquant.Recipe.FAST.replace(softmax_quantizer=grid)
    simulation = fxquant.quantize(make("attention"), calibration, 4, 4, False, recipe=recipe, progress=False)
    lowered = fxquant.lower(simulation)
    assert sum(isinstance(module, CpuIntegerLayer) for module in lowered.modules()) >= 2
    kept = [module.grid for module in lowered.modules() if isinstance(module, LogQuantizer)]
    assert kept == [module.grid for module in simulation.modules() if isinstance(module, LogQuantizer)]
    assert kept == 2 * [grid]
    skipped = dict(fxquant.report(lowered).record.passes[-1].skipped)
    products = [node.name for node in simulation.graph.nodes if kind(node) == "matmul"]
    assert products
    assert all("multiplies two tensors" in skipped[name] for name in products)
    assert_same(lowered, simulation)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_on_a_gpu(calibration, name, pack):
    simulation = fxquant.quantize(make(name), calibration, 4, 4, False, recipe="fast", edges="integer", progress=False)
    lowered, x = fxquant.lower(simulation, "cuda", pack=pack), small_images(32)
    compiled = fxquant.compile(lowered)
    with torch.no_grad():
        wanted = simulation(x)
        for network in (lowered, compiled):
            y = network(x.cuda()).cpu()
            assert ((y - wanted).abs().amax(1) < 1e-4 * (wanted.max() - wanted.min())).all()


@pytest.mark.cuda
@needs_cuda
def test_cuda_graphs(calibration):
    simulation = fxquant.quantize(make("residual"), calibration, 4, 4, False, recipe="fast", edges="integer", progress=False)
    lowered = fxquant.lower(simulation, "cuda")
    compiled, plain = fxquant.compile(lowered, cuda_graphs=True), fxquant.compile(lowered)
    for count in (1, 32):
        batches = [x.cuda() for x in small_images(2 * count).split(count)]
        for _ in range(3):  # the first calls record
            first, second = (compiled(x) for x in batches)
        assert torch.equal(first, plain(batches[0])), "the second call wrote over the first one's logits"
        assert torch.equal(second, plain(batches[1]))


def test_cuda_graphs_need_a_gpu(simulation):
    with pytest.raises(ConfigError, match=r"cuda_graphs: the network is on the CPU. Move it with .to\('cuda'\), or leave cuda_graphs out"):
        fxquant.compile(simulation, cuda_graphs=True)


@dataclasses.dataclass
class Found:
    logits: torch.Tensor


@pytest.mark.parametrize("form", [lambda y: y, lambda y: {"logits": y}, lambda y: [y], Found], ids=["tensor", "dict", "list", "dataclass"])
def test_what_cuda_graphs_give_is_copied(monkeypatch, form):
    buffer = torch.zeros(2, 10)

    def replayed(images):
        buffer.fill_(float(images.max()))
        return form(buffer)

    monkeypatch.setattr("fxquant.deploy.compiled.is_on_cpu", lambda network: False)
    monkeypatch.setattr(torch, "compile", lambda network, **given: replayed)
    compiled = fxquant.compile(make("chain"), cuda_graphs=True)
    first, second = compiled(torch.ones(2, 3, 16, 16)), compiled(2 * torch.ones(2, 3, 16, 16))
    assert type(first) is type(form(buffer))
    assert tensors_of(first)[0].unique().item() == 1 and tensors_of(second)[0].unique().item() == 2


def test_cuda_graphs_are_asked_for(simulation, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda network, fullgraph, options: asked.append(options["triton.cudagraphs"]))
    for chosen in (True, False):
        fxquant.compile(copy.deepcopy(simulation).to("meta"), cuda_graphs=chosen)
    assert asked == [True, False]


@pytest.mark.cuda
@needs_cuda
def test_two_graphs_of_a_simulation_on_a_gpu(calibration):
    simulation = fxquant.quantize(make("residual"), calibration, 4, 4, False, recipe="fast", progress=False).cuda()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(simulation, fullgraph=True)
    with torch.no_grad():
        for count in (1, 2, 15, 16, 64):
            x = small_images(count).cuda()
            close = torch.isclose(compiled(x), simulation(x), rtol=1e-3, atol=1e-3).all(1)
            assert close.float().mean() > 0.9
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
