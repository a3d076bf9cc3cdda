"""AppendCAT: a module behind the logits, or, with one cluster, nothing but other numbers in the classifier."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import Net, apply, classes, images, names, prepared
from test_contract import some_cat
from test_insert_fake_quant import quantized
from torch import nn

from fxquant import trace
from fxquant.cat import CAT
from fxquant.errors import CATError
from fxquant.graph import called
from fxquant.passes import AppendCAT, Freeze

FLOAT = torch.float32


def test_appended_behind_the_logits():
    gm = prepared("chain")
    cat = some_cat(FLOAT, 3)
    new, log = apply(gm, AppendCAT(cat))
    assert (log.count, log.skipped, log.notes) == (1, [], [])
    assert names(new) == [*names(gm)[:-1], "cat", "output"]
    assert classes(new) - classes(gm) == {"CAT": 1}
    assert torch.equal(new(images()), cat(gm(images())))


@pytest.mark.parametrize("bias", [True, False])
def test_one_cluster_is_folded_into_a_float_classifier(bias):
    gm = prepared(Net(lambda s, x: s.fc(x.mean((2, 3))), fc=nn.Linear(3, 5, bias=bias)))
    cat = some_cat(FLOAT, 1)
    new, log = apply(gm, AppendCAT(cat))
    assert (names(new), log.notes) == (names(gm), ["one cluster: folded into fc, free at inference"])
    torch.testing.assert_close(new(images()), cat(gm(images())), rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """Its classifier is called, or its weight read, in front of the logits as well."""

    def __init__(self, called: bool):
        super().__init__()
        self.called, self.fc = called, nn.Linear(5, 5)

    def forward(self, x):
        x = x[:, 0, 0, :5]
        return self.fc(self.fc(x) if self.called else F.linear(x, self.fc.weight))


@pytest.mark.parametrize("called", [True, False])
def test_a_classifier_that_is_used_elsewhere_stays_as_it_is(called):
    gm, cat = trace(Twice(called).eval(), images()), some_cat(FLOAT, 1)
    new, log = apply(gm, AppendCAT(cat))
    assert classes(new) - classes(gm) == {"CAT": 1}
    assert ("called 2 times" if called else "also read outside") in log.skipped[0][1]
    assert torch.equal(new(images()), cat(gm(images())))


@pytest.mark.parametrize("freeze", [True, False])
def test_one_cluster_is_folded_into_the_scales_of_a_quantized_classifier(freeze):
    _, _, gm, _, _ = quantized("residual", 3, 4)
    if freeze:
        gm, _ = apply(gm, Freeze())
    cat = some_cat(FLOAT, 1)
    new, _ = apply(gm, AppendCAT(cat))
    before, after = gm.get_submodule("fc.3"), new.get_submodule("fc.3")
    gamma, _ = cat.affine()
    assert torch.equal(before.codes(), after.codes())
    torch.testing.assert_close(after.weight_quantizer.scale, gamma[0] * before.weight_quantizer.scale)
    torch.testing.assert_close(new(images()), cat(gm(images())), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param(lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1), id="pool, flatten"),
        pytest.param(lambda y: F.adaptive_avg_pool2d(y, (1, 1)).flatten(1), id="pool of a pair, flatten"),
        pytest.param(lambda y: y.mean((2, 3)), id="mean"),
        pytest.param(lambda y: y.mean([2, 3], keepdim=True).flatten(1), id="mean, flatten"),
        pytest.param(lambda y: F.avg_pool2d(y, y.shape[-1]).flatten(1), id="pool as large as the map, flatten"),
    ],
)
@pytest.mark.parametrize(("size", "bias"), [(1, True), (1, False), (3, True)])
def test_one_cluster_is_folded_into_a_convolution_in_front_of_a_pool(pool, size, bias):
    gm = prepared(Net(lambda s, x: pool(s.conv(s.stem(x))), stem=nn.Conv2d(3, 4, 3), conv=nn.Conv2d(4, 5, size, bias=bias)))
    cat = some_cat(FLOAT, 1)
    new, log = apply(gm, AppendCAT(cat))
    assert (names(new), log.notes, log.skipped) == (names(gm), ["one cluster: folded into conv, free at inference"], [])
    assert classes(new) == classes(gm)
    torch.testing.assert_close(new(images()), cat(gm(images())), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "layer"),
    [
        pytest.param(lambda s, x: s.layer(x).mean((1, 2)), nn.Conv2d(3, 16, 1), id="mean over channels"),
        pytest.param(lambda s, x: s.layer(x).mean((2, 3)), nn.Linear(16, 3), id="linear layer over the columns"),
        pytest.param(lambda s, x: F.avg_pool2d(s.layer(x), 16, 32, 8).flatten(1), nn.Conv2d(3, 5, 1), id="padding counted"),
        pytest.param(lambda s, x: F.avg_pool2d(s.layer(x), 16, divisor_override=1).flatten(1), nn.Conv2d(3, 5, 1), id="another divisor"),
    ],
)
def test_one_cluster_is_not_folded_where_a_gain_and_a_shift_do_not_pass_through(body, layer):
    gm = prepared(Net(body, layer=layer))
    count = gm(images()).shape[1]
    cat = CAT.from_clusters(torch.linspace(0.5, 1.5, count)[None], torch.linspace(-1, 1, count)[None], 0.5)
    new, log = apply(gm, AppendCAT(cat))
    assert log.skipped and log.skipped[0][1].endswith("appended as a module")
    torch.testing.assert_close(new(images()), cat(gm(images())), rtol=1e-5, atol=1e-5)


def test_one_cluster_is_folded_into_a_convolution_over_the_whole_map():
    gm = prepared(Net(lambda s, x: s.conv(x).flatten(1), conv=nn.Conv2d(3, 5, 16)))
    cat = some_cat(FLOAT, 1)
    new, log = apply(gm, AppendCAT(cat))
    assert (names(new), log.notes) == (names(gm), ["one cluster: folded into conv, free at inference"])
    torch.testing.assert_close(new(images()), cat(gm(images())), rtol=1e-5, atol=1e-5)


def test_one_cluster_is_folded_into_the_scales_of_a_quantized_convolution():
    net = Net(lambda s, x: s.conv(s.stem(x).relu()).mean((2, 3)), stem=nn.Conv2d(3, 4, 3), conv=nn.Conv2d(4, 5, 1))
    _, _, gm, _, _ = quantized(net, 3, 4)
    cat = some_cat(FLOAT, 1)
    new, log = apply(gm, AppendCAT(cat))
    assert log.notes == ["one cluster: folded into conv, free at inference"]
    before, after = gm.get_submodule("conv"), new.get_submodule("conv")
    assert torch.equal(before.codes(), after.codes())
    torch.testing.assert_close(after.weight_quantizer.scale, cat.affine()[0][0] * before.weight_quantizer.scale)
    torch.testing.assert_close(new(images()), cat(gm(images())), rtol=1e-4, atol=1e-4)


NEGATIVE = CAT.from_clusters(torch.tensor([[1.0, 1, -1, 1, 1]]), torch.zeros(1, 5))


@pytest.mark.parametrize(
    ("body", "cat", "where", "reason"),
    [
        (lambda s, x: s.fc(x.mean((2, 3))).relu(), None, "relu", "the logits come from relu, which is no linear layer or convolution"),
        (
            lambda s, x: F.adaptive_avg_pool2d(s.conv(x).relu(), 1).flatten(1),
            None,
            "flatten",
            "the logits come from relu, which is no linear layer or convolution",
        ),
        (
            lambda s, x: F.max_pool2d(s.conv(x), 16).flatten(1),
            None,
            "flatten",
            "the logits come from max_pool2d, which is no linear layer or convolution",
        ),
        (lambda s, x: s.fc(x.mean((2, 3))), NEGATIVE, "fc", "a class has a factor that is not positive"),
    ],
)
def test_not_folded(body, cat, where, reason):
    cat = cat or some_cat(FLOAT, 1)
    gm = prepared(Net(body, fc=nn.Linear(3, 5), conv=nn.Conv2d(3, 5, 1)))
    new, log = apply(gm, AppendCAT(cat))
    assert log.skipped == [(where, f"not folded, {reason}; appended as a module")]
    assert classes(new)["CAT"] == 1
    torch.testing.assert_close(new(images()), cat(gm(images())))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda s, x: (x.mean((2, 3)), x), r"Net: returns a tuple, not one tensor of logits \[N, C\]. Use cat=False."),
        (lambda s, x: {"a": x}, r"Net: returns a dict, not one tensor of logits"),
        (lambda s, x: s.fc(x), r"Net: returns \['N', 3, 16, 5\], not logits \[N, C\]. Use cat=False."),
        (lambda s, x: x.mean((2, 3)), r"Net: gives 3 logits, the CAT was fitted to 5. Use cat=False."),
    ],
)
def test_refusals(body, message):
    with pytest.raises(CATError, match=message):
        apply(prepared(Net(body, fc=nn.Linear(16, 5))), AppendCAT(some_cat(FLOAT)))


def test_a_free_name_is_taken_and_a_second_cat_refused():
    gm = prepared(Net(lambda s, x: s.cat(x.mean((2, 3))), cat=nn.Linear(3, 5)))
    new, log = apply(gm, AppendCAT(some_cat(FLOAT)))
    assert [node.target for node, part in called(new) if isinstance(part, CAT)] == ["cat_1"]
    again, log = apply(new, AppendCAT(some_cat(FLOAT)))
    assert again is new
    assert log.count == 0
