"""The walk: every unit is run once a side and batch, every tensor is the network's own, and nothing stays longer than it is read."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from nets import NETS, Net, apply, head, images, prepared, traced
from test_learners import CPU, nudge, pair, soft
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from fxquant import execution
from fxquant.errors import ConfigError
from fxquant.execution import BATCH, bytes_per_image
from fxquant.graph import called, fork, is_tensor
from fxquant.kinds import kind
from fxquant.passes import ReconstructUnits, reconstruct_units
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.recipe import Recipe
from fxquant.reconstruction import walk as module
from fxquant.reconstruction.learners import Learners, put_modules
from fxquant.reconstruction.store import Store
from fxquant.reconstruction.walk import Visit, Walk, cache_of, channel_axis, peak_need, peak_need_of_packs
from fxquant.units import Unit, cut, merge

COUNT = BATCH + 6
ROWS = torch.arange(COUNT)
BRIEFLY = Recipe.QDROP.replace(unit_iterations=3, unit_batch=8)
GRANULARITIES = ("layer", "block", "network")
FAR = 1e12


@cache
def zoo(name: str) -> tuple[GraphModule, GraphModule]:
    """Return teacher and student of a net of `nets`; fork them before changing anything."""
    return pair(name, 3, 3)


def fresh(name: str) -> tuple[GraphModule, GraphModule]:
    teacher, student = zoo(name)
    return teacher, fork(student)


def uneven(count: int = COUNT) -> list[Tensor]:
    """Return the images in batches that have nothing to do with those of the walk."""
    return list(images(count).tensor_split([1, 8, 9, min(41, count)]))


def walk_of(
    teacher: GraphModule, student: GraphModule, units: list[Unit] | None = None, budget: float = FAR, count: int = COUNT, **options
) -> Walk:
    store = Store(count, CPU, budget, options.pop("dtype", None))
    return Walk(teacher, student, cut(teacher) if units is None else units, uneven(count), store, **options)


def learn(student: GraphModule, visit: Visit) -> None:
    """Put other weights and scales into the student, as learning does."""
    learners = soft(visit.student)
    nudge(learners, seed=visit.index)
    put_modules(student, learners.fixed())


@torch.no_grad()
def values_of(gm: GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Return the value of every node in whole forward passes over the batches the walk takes; quantized values under the plain name too."""
    parts: dict[str, list[Tensor]] = {}
    for batch in x.split(BATCH):
        run = Interpreter(gm, garbage_collect_values=False)
        run.run(batch.clone())
        for node, value in run.env.items():
            if isinstance(value, Tensor):
                parts.setdefault(node.name, []).append(value)
    values = {name: torch.cat(part) for name, part in parts.items() if part[0].ndim and len(part[0]) == min(BATCH, len(x))}
    return values | {name.removeprefix("activations_"): value for name, value in values.items() if name.startswith("activations_")}


def counting(gm: GraphModule, calls: Counter[str]) -> None:
    """Count calls of the layers of a graph; copies that learners make of a layer count as the layer."""
    for node, layer in called(gm):
        if getattr(layer, "weight", None) is not None:
            layer.register_forward_hook(lambda *_, path=str(node.target): calls.update([path]))


def readers_of(units: list[Unit]) -> dict[str, int]:
    """Return the last unit that reads each tensor."""
    return {name: index for index, unit in enumerate(units) for name in unit.inputs}


# ---- how often units run ----


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NETS)
def test_every_unit_runs_once_a_side_and_batch(name, granularity):
    teacher, student = fresh(name)
    calls: dict[str, Counter[str]] = {"float": Counter(), "student": Counter()}
    counting(teacher, calls["float"])
    counting(student, calls["student"])
    units = cut(teacher, granularity)
    visited = [visit.unit for visit in walk_of(teacher, student, units)]
    assert visited == [unit for unit in units if unit.layers]
    last, batches = readers_of(units), len(ROWS.split(BATCH))
    for unit in units:
        read = any(output in last for output in unit.outputs)
        for layer in unit.layers:
            assert calls["float"][layer] == batches
            assert calls["student"][layer] == (batches if read else 0), "nobody reads what the last unit makes of the quantized input"


@pytest.mark.parametrize("name", NETS)
def test_one_graph_on_both_sides_is_run_and_held_once(name):
    teacher = fresh(name)[0]
    calls: Counter[str] = Counter()
    counting(teacher, calls)
    units, nodes = cut(teacher), {node.name: node for node in teacher.graph.nodes}
    walk = walk_of(teacher, teacher, units)
    expected = values_of(teacher, torch.cat(uneven()))
    calls.clear()
    for visit in walk:
        assert all(map(torch.equal, visit.floats(ROWS), visit.quantized(ROWS)))
        torch.testing.assert_close(visit.targets(ROWS), tuple(expected[name] for name in visit.unit.outputs))
        assert len(set(visit.store.names)) == len({stored.split(":")[-1] for stored in visit.store.names}) == len(visit.store.names)
    assert set(calls.values()) == {len(ROWS.split(BATCH))}
    everything = {name for unit in units for name in (*unit.inputs, *unit.outputs)}
    assert walk.store.peak <= COUNT * sum(bytes_per_image(nodes[name]) for name in everything)


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", ["residual", "dense", "attention"])
def test_learning_runs_no_float_layer_again(name, granularity):
    teacher, student = fresh(name)
    calls: Counter[str] = Counter()
    counting(teacher, calls)
    step = ReconstructUnits(teacher, uneven(), BRIEFLY.replace(unit_granularity=granularity), 0, CPU)
    step(student)
    layers = [layer for unit in cut(teacher) for layer in unit.layers]
    assert {layer: calls[layer] for layer in layers} == dict.fromkeys(layers, len(ROWS.split(BATCH)))


def test_the_passes_over_units_that_fill_the_cache_are_linear_in_their_number(monkeypatch):
    fills: Counter[str] = Counter()
    real = Walk._outputs

    def counted(self, graph, unit, side):
        for values in real(self, graph, unit, side):
            fills.update([f"{side} {unit.name}"])
            yield values

    monkeypatch.setattr(Walk, "_outputs", counted)
    teacher, student = fresh("residual")
    units = cut(teacher, "layer")
    for visit in walk_of(teacher, student, units):
        learn(student, visit)
    assert set(fills.values()) == {len(ROWS.split(BATCH))}
    assert len(units) <= len(fills) <= 2 * len(units)


def test_units_with_large_values_are_run_on_few_images_at_once(monkeypatch):
    teacher, student = fresh("residual")
    wanted = [(visit.targets(ROWS), visit.quantized(ROWS)) for visit in walk_of(teacher, student, cut(teacher))]
    monkeypatch.setattr(execution, "LARGEST_VALUE", 3 * 4 * 2048)  # three images where a value has 8 channels of 16 x 16
    sizes = []
    for visit, (targets, quantized) in zip(walk_of(teacher, student, cut(teacher)), wanted, strict=True):
        sizes.append(visit.images_at_once())
        torch.testing.assert_close(visit.targets(ROWS), targets)
        torch.testing.assert_close(visit.quantized(ROWS), quantized)
    assert sizes == sorted(sizes) and sizes[0] == 3 and sizes[-1] > 3


def test_images_are_taken_once(monkeypatch):
    taken: list[int] = []

    class Images(list):
        def __iter__(self):
            taken.append(1)
            return super().__iter__()

    teacher, student = fresh("residual")
    walk = Walk(teacher, student, cut(teacher), Images(uneven()), Store(COUNT, CPU, FAR))
    assert sum(1 for _ in walk) > 2
    assert taken == [1]


# ---- what goes in and should come out ----


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NETS)
def test_inputs_and_targets_are_those_of_both_whole_networks_bit_for_bit(name, granularity):
    teacher, student = fresh(name)
    x = torch.cat(uneven())
    floats = values_of(teacher, x)
    seen = 0
    for visit in walk_of(teacher, student, cut(teacher, granularity)):
        wanted = values_of(student, x)  # with everything that has been learned in front
        for names, found, values in (
            (visit.unit.outputs, visit.targets(ROWS), floats),
            (visit.unit.inputs, visit.floats(ROWS), floats),
            (visit.unit.inputs, visit.quantized(ROWS), wanted),
        ):
            assert len(names) == len(found)
            for output, value in zip(names, found, strict=True):
                if "attention" in name:  # the cache is row-major and its tokens are not: a mean over them rounds differently
                    torch.testing.assert_close(value, values[output], rtol=1e-6, atol=1e-6)
                else:
                    assert torch.equal(value, values[output]), (visit.unit.name, output)
        learn(student, visit)
        seen += 1
    assert seen


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["residual", "dense", "squeeze_excite"])
def test_the_quantizer_of_the_images_is_learned_with_the_units_that_read_them(name, granularity):
    teacher, student = pair(name, 3, 3, edges="integer")
    x, learned = torch.cat(uneven()), set()
    for visit in walk_of(teacher, student, cut(teacher, granularity)):
        wanted = values_of(student, x) | {"x": x}
        for given, value in zip(visit.unit.inputs, visit.quantized(ROWS), strict=True):
            assert torch.equal(value, wanted[given]), (visit.unit.name, given)
        given = [node.name for node in visit.student.graph.find_nodes(op="placeholder")]
        assert [name.removeprefix("activations_") for name in given] == list(visit.unit.inputs) and "activations_x" not in given
        learn(student, visit)
        learned |= {str(node.target) for node, _ in called(visit.student)}
    assert "activations.x" in learned


def test_the_quantizer_of_images_that_two_units_read_is_learned_once():
    """What the second unit would make of it would not be what the outputs of the first were cached with."""
    net = Net(
        lambda self, x: self.head((self.one(x) + self.two(x)).relu()), one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(3, 4, 3), head=head(4)
    ).eval()
    teacher, student = pair(net, 3, 3, edges="integer")
    recipe = Recipe.PDQUANT.replace(
        unit_granularity="layer", unit_iterations=30, unit_correction_iterations=1, unit_batch=8, unit_activation_rate=1e-2
    )
    scales, settled, learn_one = [], [], ReconstructUnits._learn

    def seeing(self, gm, walk, visit, *rest):
        learn_one(self, gm, walk, visit, *rest)
        scales.append(gm.get_submodule("activations.x").scale.item())
        settled.append(set(visit.settled))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReconstructUnits, "_learn", seeing)
        new = apply(student, ReconstructUnits(teacher, uneven(), recipe, 0, CPU))[0]
    assert settled[:2] == [set(), {"activations.x"}]
    assert scales[0] != student.get_submodule("activations.x").scale.item()
    assert {*scales, new.get_submodule("activations.x").scale.item()} == {scales[0]}


@pytest.mark.parametrize("name", ["residual", "dense", "attention"])
def test_learned_units_change_what_later_ones_read(name):
    teacher, student = fresh(name)
    x = torch.cat(uneven())
    before = values_of(student, x)
    changed = []
    for visit in walk_of(teacher, student):
        changed += [not torch.equal(a, before[n]) for n, a in zip(visit.unit.inputs, visit.quantized(ROWS), strict=True) if n != "x"]
        learn(student, visit)
    assert changed and all(changed)


def test_units_with_several_inputs():
    teacher, student = fresh("dense")
    units = cut(teacher, "layer")
    assert max(len(unit.inputs) for unit in units) > 1
    walk = walk_of(teacher, student, units)
    floats = values_of(teacher, torch.cat(uneven()))
    for visit in walk:
        for index in (torch.tensor([3]), torch.tensor([69, 0, 0, 33])):
            for name, value in zip(visit.unit.inputs, visit.floats(index), strict=True):
                assert torch.equal(value, floats[name][index])


@pytest.mark.parametrize("name", ["residual", "dense", "several_outputs"])
def test_float_activations(name):
    teacher, student = fresh(name)
    plain = Learners(student, None, None, float_activations=True).graph
    x = torch.cat(uneven())
    wanted = {node: value for node, value in values_of(plain, x).items() if not node.startswith("activations_")}
    for visit in walk_of(teacher, student, activations=False):
        for input, value in zip(visit.unit.inputs, visit.quantized(ROWS), strict=True):
            assert torch.equal(value, wanted[input])


@pytest.mark.parametrize("split", [[COUNT], [1] * COUNT, [64, 6], [6, 64], [13, 57]])
def test_the_batches_of_the_images_do_not_matter(split):
    found = []
    for parts in (split, [35, 35]):
        teacher, student = fresh("residual")
        store = Store(COUNT, CPU, FAR)
        walk = Walk(teacher, student, cut(teacher), list(images(COUNT).split(parts)), store)
        found.append([value for visit in walk for value in (*visit.quantized(ROWS), *visit.targets(ROWS))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_student_at_the_end_is_read_by_name():
    teacher, student = fresh("residual")
    x = torch.cat(uneven())
    walk = walk_of(teacher, student)
    wanted = values_of(student, x)
    for visit in walk:
        (name,) = visit.unit.inputs
        assert torch.equal(walk.rows(name, ROWS), wanted[name])


def test_neither_network_gets_gradients_or_changes(untouched):
    teacher, student = pair("residual", 3, 3)
    with untouched(teacher), untouched(student):
        for visit in walk_of(teacher, student):
            assert not any(value.requires_grad for value in visit.targets(ROWS) + visit.quantized(ROWS))
            assert not any(part.requires_grad for part in visit.teacher.parameters())


# ---- what is held ----


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NETS)
def test_tensors_go_behind_their_last_reader(name, granularity):
    teacher, student = fresh(name)
    units = cut(teacher, granularity)
    last, walk = readers_of(units), walk_of(teacher, student, units)
    made = {output: index for index, unit in enumerate(units) for output in unit.outputs}
    for visit in walk:
        waiting = {tensor for tensor, reader in last.items() if reader >= visit.index and made.get(tensor, -1) < visit.index}
        expected = {f"{side}:{tensor}" for tensor in waiting - walk.shared for side in ("float", "student")} | (waiting & walk.shared)
        expected |= {f"float:{output}" for output in visit.unit.outputs}
        assert set(walk.store.names) == expected, visit.unit.name
    assert walk.store.names == []


@torch.no_grad()
def sizes_of(teacher: GraphModule) -> dict[str, int]:
    """Return bytes an image of every tensor, as it is when the network runs."""
    return {name: value[0].numel() * value.element_size() for name, value in values_of(teacher, images(4)).items()}


def one_unit_at_a_time(units: list[Unit], sizes: dict[str, int], shared: frozenset[str]) -> int:
    """Return the bytes an image that the unit with the most needs: inputs and outputs of both sides, and what passes by it."""
    last = readers_of(units)
    made = {output: index for index, unit in enumerate(units) for output in unit.outputs} | dict.fromkeys(shared, -1)
    most = 0
    for index, unit in enumerate(units):
        alive = {tensor for tensor, reader in last.items() if made[tensor] <= index <= reader}
        total = sum(sizes[tensor] * (1 if tensor in shared else 2) for tensor in alive)
        if unit.layers:  # what nobody reads further has a target, and nothing else
            total += sum(sizes[output] for output in unit.outputs if output not in last)
        most = max(most, total)
    return most


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NETS)
def test_the_peak_is_that_of_one_unit(name, granularity):
    teacher, student = fresh(name)
    units = cut(teacher, granularity)
    walk = walk_of(teacher, student, units)
    for visit in walk:
        learn(student, visit)
    assert walk.store.peak == COUNT * one_unit_at_a_time(units, sizes_of(teacher), walk.shared)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NETS)
def test_what_is_announced_is_what_is_held(name, granularity, dtype):
    teacher, student = fresh(name)
    units = cut(teacher, granularity)
    walk = walk_of(teacher, student, units, dtype=dtype)
    for _ in walk:
        pass
    assert peak_need(teacher, units, COUNT, 0.5 if dtype else 1.0) == walk.store.peak


@pytest.mark.parametrize("extra", [{"unit_fisher": "diagonal"}, {"unit_correction_iterations": 1}])
@pytest.mark.parametrize("name", ["residual", "mobile", "dense"])
def test_what_recipes_store_besides_is_announced(name, extra, monkeypatch):
    """Exactly, but for correction, which units without batch norms do not get."""
    teacher, student = fresh(name)
    stores: list[Store] = []
    monkeypatch.setattr(reconstruct_units, "cache_of", lambda *given: stores.append(cache_of(*given)) or stores[-1])
    ReconstructUnits(teacher, uneven(), BRIEFLY.replace(**extra), 0, CPU)(student)
    announced = peak_need(teacher, cut(teacher), COUNT, 1.0, "unit_fisher" in extra, "unit_correction_iterations" in extra)
    exact = name != "dense" or "unit_fisher" in extra
    assert announced == stores[0].peak if exact else announced > stores[0].peak


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("name", NETS)
def test_what_is_announced_for_packs_is_the_most_that_any_pack_holds(name, length):
    teacher, student = fresh(name)
    units = cut(teacher)
    inner = [index for index, unit in enumerate(units) if unit.layers][1:-1]
    held = [peak_need(teacher, units, COUNT)]
    for place, first in enumerate(inner):
        for last in inner[place + 1 : place + length]:
            walk = walk_of(teacher, student, [*units[:first], merge(teacher, units[first : last + 1]), *units[last + 1 :]])
            for _ in walk:
                pass
            held.append(walk.store.peak)
    assert peak_need_of_packs(teacher, units, COUNT, length) == max(held)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"unit_fisher": "diagonal"},
        {"unit_kl_weight": 1.0},
        {"unit_correction_iterations": 1},
        {"unit_granularity": "layer"},
        {"cache_dtype": "bfloat16"},
    ],
)
@pytest.mark.parametrize("name", ["residual", "mobile", "dense"])
def test_the_pass_holds_no_more_than_a_fifth_beyond_one_unit(name, fields, monkeypatch):
    """Also with what some recipes add to the inputs and outputs of a unit while it is learned: gradients, corrected inputs and targets."""
    stores: list[Store] = []
    real = module.cache_of
    monkeypatch.setattr("fxquant.passes.reconstruct_units.cache_of", lambda *args: stores.append(real(*args)) or stores[-1])
    teacher, student = fresh(name)
    recipe = BRIEFLY.replace(**fields)
    ReconstructUnits(teacher, uneven(), recipe, 0, CPU)(student)
    (store,) = stores
    units, sizes = cut(teacher, recipe.unit_granularity), sizes_of(teacher)
    share = 0.5 if recipe.cache_dtype == "bfloat16" else 1.0
    limit = one_unit_at_a_time(units, sizes, frozenset({"x"}))
    if recipe.unit_fisher != "none":
        limit += max(sum(sizes[output] for output in unit.outputs) for unit in units)
    if recipe.unit_correction_iterations:
        limit += max(sum(sizes[tensor] for tensor in unit.inputs + unit.outputs) for unit in units if unit.layers)
    assert store.peak <= 1.2 * COUNT * share * limit
    assert store.names == []


def test_the_peak_of_a_deep_network_does_not_grow_with_its_depth(make_net):
    peaks = []
    for depth in (1, 4):
        teacher, student = pair(make_net(depth=depth), 3, 3)
        walk = walk_of(teacher, student)
        assert sum(1 for _ in walk) == depth + 2
        peaks.append(walk.store.peak)
    assert peaks[0] == peaks[1]


# ---- where it is held ----


@pytest.mark.parametrize("name", NETS)
def test_disk_and_memory_hold_the_same(name):
    found, places = [], []
    for budget in (FAR, 0.0, 60_000.0 * COUNT / 70):
        teacher, student = fresh(name)
        walk = walk_of(teacher, student, budget=budget)
        found.append([])
        places.append(set())
        for visit in walk:
            places[-1] |= set(walk.store.places.values())
            assert walk.store.memory <= budget
            found[-1] += [*visit.floats(ROWS), *visit.quantized(ROWS), *visit.targets(ROWS)]
            learn(student, visit)
    assert places[0] == {"host"}
    assert places[1] == {"disk"}
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_failing_unit_leaves_its_error_and_no_half_tensor(monkeypatch):
    teacher, student = fresh("residual")
    walk = walk_of(teacher, student)
    steps = iter(walk)
    next(steps)
    real = Walk._outputs

    def broken(self, graph, unit, side):
        yield next(real(self, graph, unit, side))
        raise KeyboardInterrupt

    monkeypatch.setattr(Walk, "_outputs", broken)
    before = walk.store.names
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert walk.store.names == before


def test_the_cache_is_what_the_recipe_says():
    store = cache_of(Recipe(memory_gib=0.5), 7, CPU)
    assert (store.count, store.budget, store.dtype) == (7, 0.5 * 2**30, None)
    assert cache_of(Recipe(cache_dtype="bfloat16"), 7, CPU).dtype == torch.bfloat16


def test_bfloat16_halves_the_bytes_and_keeps_values_to_three_digits():
    peaks, found = [], []
    for dtype in (None, torch.bfloat16):
        teacher, student = fresh("residual")
        walk = walk_of(teacher, student, dtype=dtype)
        found.append([visit.targets(ROWS)[0] for visit in walk])
        peaks.append(walk.store.peak)
    assert 2 * peaks[1] == peaks[0]
    for exact, narrow in zip(*found, strict=True):
        assert exact.dtype == narrow.dtype == torch.float32
        assert (exact - narrow).norm() < 0.01 * exact.norm()


def test_the_traced_sizes_are_the_true_ones():
    """What `peak_need` adds up, against values."""
    for name in NETS:
        teacher, _ = zoo(name)
        true = sizes_of(teacher)
        for unit in cut(teacher):
            for node in teacher.graph.nodes:
                if node.name in unit.outputs and bytes_per_image(node):
                    assert bytes_per_image(node) == true[node.name], (name, node.name)


# ---- the pass around it ----


def partition_of(**fields) -> list[Unit]:
    teacher, student = fresh("residual")
    return ReconstructUnits(teacher, uneven(), BRIEFLY.replace(**fields), 0, CPU).partition(student)


def test_granularities_of_the_pass():
    teacher, _ = zoo("residual")
    for granularity in GRANULARITIES:
        assert partition_of(unit_granularity=granularity) == cut(teacher, granularity)
    whole, opened = partition_of(unit_granularity="block"), partition_of(unit_granularity="block", unit_longest=2)
    assert max(len(unit.layers) for unit in opened) <= 2 < max(len(unit.layers) for unit in whole)
    packed = partition_of(unit_granularity="pack")
    assert [name for unit in packed for name in unit.nodes] == [name for unit in cut(teacher) for name in unit.nodes]


@pytest.mark.parametrize("count", [1, 2, 5, BATCH, BATCH + 1])
def test_few_images(count):
    teacher, student = fresh("residual")
    step = ReconstructUnits(teacher, [images(count)], BRIEFLY, 0, CPU)
    out = step(student).graph_module(images(2))
    assert out.isfinite().all()
    batches = [note for note in step.log.notes if note.startswith("batches of")]
    assert batches == ([f"batches of {count}: there are no more images"] if count < 8 else [])


@pytest.mark.parametrize("name", NETS)
def test_the_pass_learns_and_says_how_well(name):
    teacher, student = fresh(name)
    step = ReconstructUnits(teacher, uneven(), BRIEFLY, 0, CPU)
    result = step(student).graph_module
    units = [unit for unit in cut(teacher) if unit.layers]
    assert step.log.count == len(units)
    for unit, note in zip(units, step.log.notes, strict=False):
        assert note.startswith(f"{unit.name}: relative error ")
    assert step.log.notes[len(units)] == f"{len(units)} units, block by block"
    assert "GiB at most" in step.log.notes[-1]
    assert all(
        isinstance(part, QuantizedLayer) == isinstance(student.get_submodule(str(node.target)), QuantizedLayer)
        for node, part in called(result)
    )


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_two_devices(which):
    teacher, student = pair("residual", 3, 3)
    teacher, student = (teacher.to("meta"), student) if which == "teacher" else (teacher, student.to("meta"))
    step = ReconstructUnits(teacher, uneven(), BRIEFLY, 0, CPU)
    with pytest.raises(ConfigError) as caught:
        step(student)
    assert "'meta'" in str(caught.value) and "'cpu'" in str(caught.value)


def channels_last_block() -> nn.Module:
    def body(s, x):
        x = s.stem(x).permute(0, 2, 3, 1)
        return s.fc((x + s.linear(x)).permute(0, 3, 1, 2))

    return Net(body, stem=nn.Conv2d(3, 6, 3), linear=nn.Linear(6, 6), fc=head(6))


@pytest.mark.parametrize(("net", "axes"), [("residual", {1, -1}), ("attention", {-1, 1}), (channels_last_block, {1, -1})])
def test_the_axis_of_channels_is_that_of_the_layer(net, axes):
    """Channels come last behind linear layers, whatever the number of dimensions (Swin holds [N, H, W, C])."""
    teacher = prepared(net if isinstance(net, str) else traced(net()))
    found = {node.name: channel_axis(node) for node in teacher.graph.nodes if is_tensor(node)}
    for node in teacher.graph.nodes:
        if node.op == "call_module" and kind(node) in ("conv", "linear"):
            assert found[node.name] == (1 if kind(node) == "conv" else -1)
    assert axes <= set(found.values())
    if net is channels_last_block:
        assert next(found[node.name] for node in teacher.graph.nodes if kind(node) == "add") == -1
