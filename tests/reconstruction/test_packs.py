"""Packs on written-out examples and as laws; sensitivities against the whole network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import Block, Net, conv_bn, head, images
from test_learners import CPU, pair, partly, spread
from torch import nn

from fxquant.execution import bytes_per_image
from fxquant.recipe import Recipe
from fxquant.reconstruction.network import with_features
from fxquant.reconstruction.packs import adaptive_packs, pack, sensitivities
from fxquant.reconstruction.store import Store
from fxquant.units import cut, on_student

FAR = 1e9


def packs(scores: list[float], length: int = 100, budget: float = FAR, sizes: list[float] | None = None) -> list[tuple[int, int]]:
    return adaptive_packs(scores, sizes or [1.0] * len(scores), length, budget)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([9, 2, 7, 8, 1, 6], [(0, 1), (1, 4), (4, 6)]),  # the one in the module's text
        ([1, 2, 3], [(0, 3)]),
        ([3, 2, 1], [(0, 1), (1, 2), (2, 3)]),
        ([5, 5, 5], [(0, 3)]),  # equal scores: the first one is visited first
        ([4], [(0, 1)]),
        ([], []),
    ],
)
def test_packs_by_hand(scores, expected):
    assert packs(scores) == expected


def test_long_and_large_packs_are_split_from_the_front():
    assert packs([1, 2, 3, 4, 5], length=2) == [(0, 2), (2, 4), (4, 5)]
    assert packs([9, 2, 7, 8, 1, 6], length=1) == [(i, i + 1) for i in range(6)]
    assert packs([1, 2, 3, 4], budget=5, sizes=[3, 2, 1, 9]) == [(0, 2), (2, 3), (3, 4)]  # the last is too large on its own


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 5)), max_size=12), st.integers(1, 5), st.floats(1, 20))
def test_packs_are_a_partition_in_order_within_the_caps(blocks, length, budget):
    scores, sizes = [score for score, _ in blocks], [size for _, size in blocks]
    found = adaptive_packs(scores, sizes, length, budget)
    assert [index for start, end in found for index in range(start, end)] == list(range(len(scores)))
    for start, end in found:
        assert 1 <= end - start <= length
        assert end - start == 1 or sum(sizes[start:end]) <= budget + 1e-9


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_every_pack_begins_at_the_least_sensitive_block_up_to_its_end(scores):
    """The equivalent definition: cut the rest of the prefix at its smallest score, again and again."""
    expected, back = [], len(scores)
    while back:
        start = min(range(back), key=lambda index: scores[index])
        expected.insert(0, (start, back))
        back = start
    assert packs(scores) == expected


@pytest.mark.parametrize("name", ["residual", "mobile", "dense"])
@pytest.mark.parametrize("literal", [False, True])
def test_sensitivities_against_the_whole_network(name, literal):
    teacher, student = pair(spread(name), 3, 3)
    x, units = images(30), cut(teacher)
    found = sensitivities(teacher, student, units, list(x.split(7)), Store(30, CPU, FAR), literal)
    p = teacher(x).detach().double().softmax(1)
    for unit, score in zip(units, found, strict=True):
        if not unit.layers:
            assert score == 0
            continue
        mine = with_features(partly(teacher, student, unit), on_student(unit, student).outputs)
        logits, values = mine(x)
        q = logits.double().log_softmax(1)
        loss = (q.exp() * (q - p.log())).sum(1).mean()
        targets = with_features(teacher, unit.outputs)(x)[1]
        square = sum((target - value).double().square().mean() for target, value in zip(targets, values, strict=True))
        first = 0.0
        if literal and logits is not values[0]:
            gradients = torch.autograd.grad(loss, values)
            first = sum((g * (t - v)).double().mean() for g, t, v in zip(gradients, targets, values, strict=True))
        assert score == pytest.approx((2 * (loss - first) / square).item(), rel=2e-2 if literal else 5e-3)
        assert score > 0


def deep() -> nn.Module:
    stem = nn.Sequential(*conv_bn(3, 6), nn.ReLU())
    return Net(lambda s, x: s.fc(s.layers(s.stem(x))), stem=stem, layers=nn.Sequential(*(Block(6, 6) for _ in range(5))), fc=head(6))


def test_single_layers_around_the_blocks_stay_alone():
    """Packs are of blocks and of what lies between them (Pack-PTQ)."""
    stem = nn.Sequential(*conv_bn(3, 6), nn.ReLU(), *conv_bn(6, 6), nn.ReLU())
    layers = nn.Sequential(Block(6, 6), nn.Sequential(*conv_bn(6, 6), nn.ReLU()), Block(6, 6), *conv_bn(6, 6), nn.ReLU())
    torch.manual_seed(0)
    teacher, student = pair(Net(lambda s, x: s.fc(s.layers(s.stem(x))), stem=stem, layers=layers, fc=head(6)), 3, 3)
    units = cut(teacher, longest=4)
    learned = [unit.layers for unit in units if unit.layers]
    assert [len(layers) for layers in learned] == [1, 1, 2, 1, 2, 1, 1]
    packed = pack(teacher, student, units, [images(12)], Store(12, CPU, FAR), Recipe.PACKPTQ.replace(pack_length=100))
    alone = [unit.layers for unit in packed if unit.layers]
    assert alone[:2] == learned[:2] and alone[-2:] == learned[-2:]
    assert sum(alone, ()) == sum(learned, ())


def test_packs_of_a_network():
    torch.manual_seed(0)
    teacher, student = pair(deep(), 3, 3)
    units, x = cut(teacher), images(12)
    packing = lambda **fields: pack(teacher, student, units, [x], Store(12, CPU, FAR), Recipe.PACKPTQ.replace(**fields))  # noqa: E731
    blocks = [unit for unit in units if unit.layers][1:-1]
    told: list[tuple[float, float, str]] = []
    scores = sensitivities(teacher, student, units, [x], Store(12, CPU, FAR), False, lambda *said: told.append(said))
    assert told == [(number + 1, len(units), unit.name) for number, unit in enumerate(units) if unit.layers]
    expected = packs([scores[units.index(block)] for block in blocks])
    packed = [unit for unit in packing(pack_length=100) if unit.layers]
    assert [unit.layers for unit in packed[1:-1]] == [sum((b.layers for b in blocks[start:end]), ()) for start, end in expected]
    for length in (1, 2, 3):
        packed = packing(pack_length=length)
        assert sorted(name for unit in packed for name in unit.nodes) == sorted(name for unit in units for name in unit.nodes)
        learned = [unit for unit in packed if unit.layers]
        assert learned[0].layers == ("stem.0",) and learned[-1].layers == ("fc.3",)
        assert max(len(unit.layers) for unit in learned) <= 2 * length
    assert packing(pack_length=1) == units
    nodes = {node.name: node for node in teacher.graph.nodes}
    size = 16 * sum(bytes_per_image(nodes[name]) for name in blocks[0].nodes)
    fits = round(2**20 / size)  # a thousandth of a GiB for two and a half blocks
    packed = packing(pack_length=100, memory_gib=2.5 * max(1, fits) * size / 2**30, unit_batch=16 * max(1, fits))
    assert max(len(unit.layers) for unit in packed) <= 4


def test_a_network_without_logits_has_no_sensitivities():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    teacher, student = pair(net, 3, 3)
    x = images(6)
    assert sensitivities(teacher, student, cut(teacher), [x], Store(6, CPU, FAR), False) == [0.0] * len(cut(teacher))
