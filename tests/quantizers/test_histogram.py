"""What the observer and the binning keep of the data: exact counts, exact extremes, close means."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import CalibrationError, ConfigError
from fxquant.quantizers import AxisObserver, Histogram, HistogramObserver, ImageObserver, QuantSpec, activation_quantizer, observer_of


def observe(*batches, kind=HistogramObserver):
    observer = kind("layer1.conv")
    for batch in batches:
        assert observer(batch) is batch
    return observer


batch_lists = st.lists(st.tuples(st.integers(0, 2**31), st.integers(-40, 40)), min_size=1, max_size=4)


def make_batches(parts):
    batches = []
    for seed, exponent in parts:
        x = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
        batches.append(x.masked_fill(x.abs() < 0.3 * x.abs().mean(), 0))
    return batches


@settings(deadline=None, max_examples=40)
@given(batch_lists)
def test_observer_matches_a_single_pass_over_everything(parts):
    batches = make_batches(parts)
    everything = torch.cat(batches)
    h = observe(*batches).histogram()
    assert h.counts.sum() == everything.numel()
    assert h.counts[h.values == 0].sum() >= (everything == 0).sum()
    assert h.low.item() == everything.min()
    assert h.high.item() == everything.max()
    assert (h.values.diff() >= 0).all()
    # Every sorted value is represented by one at most a bin away.
    width = 2.0 ** (torch.frexp(everything.abs().max())[1].item() - 12)
    represented = h.values[0].repeat_interleave(h.counts[0].long())
    assert (represented - everything.sort().values).abs().max() <= width * (1 + 1e-3)
    assert abs(h.values.double() @ h.counts[0].double() - everything.double().sum()) <= 1e-4 * width * everything.numel()


@settings(deadline=None, max_examples=20)
@given(batch_lists)
def test_the_order_of_batches_does_not_change_the_counts(parts):
    batches = make_batches(parts)
    forward, backward = observe(*batches), observe(*batches[::-1])
    assert torch.equal(forward.bins, backward.bins)
    assert torch.equal(forward.exponent, backward.exponent)
    whole = observe(torch.cat(batches))
    assert torch.equal(forward.bins, whole.bins)
    assert torch.equal(forward.zeros, whole.zeros)


def test_zeros_are_counted_apart_from_tiny_values():
    x = torch.tensor([0.0, 0.0, -0.0, 1e-6, 1.0])
    h = observe(x).histogram()
    assert h.values[0, 0] == 0
    assert h.counts[0].tolist() == [3, 1, 1]
    assert 0 < h.values[0, 1] < 1e-4


@pytest.mark.parametrize("value", [6.0, -6.0, 0.1, 1e-42, -3e38, 1e-30])
def test_constants_are_represented_exactly(value):
    x = torch.full((5,), value)
    h = observe(x, x).histogram()
    assert h.values[h.counts > 0].tolist() == [x[0].item()]
    assert h.counts.sum() == 10


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_the_histogram_has_the_dtype_of_the_data(dtype, expected):
    h = observe(torch.randn(10).to(dtype)).histogram()
    assert {t.dtype for t in (h.values, h.counts, h.low, h.high)} == {expected}


def test_values_of_more_than_one_chunk_are_all_counted():
    x = torch.arange(100_000).float() % 7
    h = observe(x.view(10, 10, 1000).transpose(0, 2)).histogram()
    assert h.values[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert h.counts[0].tolist() == torch.bincount(x.int()).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_refused_and_leave_no_trace(bad):
    observer = observe(torch.ones(2))
    before = copy.deepcopy(observer.state_dict())
    with pytest.raises(CalibrationError, match=r"layer1.conv: the activation holds NaN or Inf"):
        observer(torch.tensor([1.0, bad]))
    assert all(torch.equal(before[key], value) for key, value in observer.state_dict().items())


def test_an_observer_that_saw_nothing_says_so():
    observer = HistogramObserver("fc")
    assert not observer.seen
    with pytest.raises(CalibrationError, match=r"fc: never saw data"):
        observer.histogram()
    with pytest.raises(CalibrationError, match=r"fc: the activation holds no values"):
        observer(torch.zeros(0, 3))
    observer(torch.zeros(2, 3))
    assert observer.seen
    assert observer.count == 6


def test_the_state_survives_saving():
    observer, other = observe(torch.randn(100)), HistogramObserver()
    other.load_state_dict(observer.state_dict())
    assert torch.equal(other.histogram().values, observer.histogram().values)


def test_the_input_keeps_its_gradient():
    x = torch.randn(4, requires_grad=True)
    HistogramObserver()(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(4))


def test_short_rows_are_kept_as_they_are():
    x = torch.randn(4, 3, 2, 2)
    h = Histogram.of(x, axis=1)
    assert torch.equal(h.values, x.transpose(0, 1).reshape(3, -1))
    assert torch.equal(h.counts, torch.ones(3, 16))
    assert torch.equal(h.low, x.amin((0, 2, 3)))
    assert Histogram.of(x).values.shape == (1, 48)
    assert Histogram.of(torch.randn(5), axis=0).values.shape == (5, 1)


def test_long_rows_are_binned_with_exact_sums_and_zeros():
    x = torch.randn(3, 5000, dtype=torch.float64)
    x[:, ::4] = 0
    h = Histogram.of(x, axis=0, max_bins=64)
    assert h.values.shape == (3, 65)
    assert h.counts.sum(1).tolist() == [5000] * 3
    assert h.counts[h.values == 0].sum() == 3 * 1250
    assert torch.allclose((h.values * h.counts).sum(1), x.sum(1))
    for row, values, counts in zip(x, h.values, h.counts, strict=True):
        represented = values.repeat_interleave(counts.long()).sort().values
        assert (represented - row.sort().values).abs().max() <= (row.max() - row.min()) / 64


@pytest.mark.parametrize("tensor", [torch.zeros(0, 3), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
def test_bad_tensors_are_refused(tensor):
    with pytest.raises(CalibrationError):
        Histogram.of(tensor)


def test_a_missing_axis_is_refused():
    with pytest.raises(ConfigError, match="has no axis 2"):
        Histogram.of(torch.zeros(2, 2), axis=2)


@settings(deadline=None, max_examples=10)
@given(batch_lists, st.sampled_from([1, 2, -2]))
def test_an_axis_is_observed_index_by_index(parts, axis):
    """Rows are what an observer of their own would have seen, padded with values that count nothing."""
    batches = [batch.view(5, 3, 20).movedim(1, axis) for batch in make_batches(parts)]
    observer = AxisObserver("scores", axis)
    assert not observer.seen
    for batch in batches:
        assert observer(batch) is batch
    h = observer.histogram()
    assert observer.seen and torch.equal(observer.low, h.low)
    for index in range(3):
        own = observe(*(batch.select(axis, index) for batch in batches), kind=ImageObserver).histogram()
        kept = own.values.shape[1]
        assert torch.equal(h.values[index, :kept], own.values[0]) and torch.equal(h.counts[index, :kept], own.counts[0])
        assert not h.counts[index, kept:].any()
        assert h.low[index] == own.low[0] and h.high[index] == own.high[0]


@pytest.mark.parametrize("method", ["lp", "minmax", "percentile", "kl"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_of_an_axis_are_those_of_its_parts(method, symmetric):
    x = torch.randn(7, 3, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 30.0])[:, None] + 0.3
    observer = AxisObserver("scores", 1)
    observer(x)
    found = activation_quantizer(observer, QuantSpec(4, signed=symmetric, symmetric=symmetric, axis=1), method)
    for index in range(3):
        own = activation_quantizer(observe(x[:, index], kind=ImageObserver), QuantSpec(4, signed=symmetric, symmetric=symmetric), method)
        torch.testing.assert_close(found.scale[index], own.scale)
        assert found.zero_point[index] == own.zero_point


@settings(deadline=None, max_examples=10)
@given(batch_lists)
def test_images_are_told_apart_without_a_change_to_what_is_counted(parts):
    """With power 0 the row has the counts, the extremes and the sum of one histogram, in whatever order the batches come."""
    batches = [batch.view(5, 60) for batch in make_batches(parts)]
    mine, whole = observe(*batches, kind=ImageObserver), observe(*batches)
    h, expected = mine.histogram(), whole.histogram()
    assert mine.seen and mine.low == h.low[0] == expected.low[0] and h.high[0] == expected.high[0]
    assert h.counts.sum() == expected.counts.sum()
    assert h.counts[h.values == 0].sum() >= sum(int((batch == 0).sum()) for batch in batches)
    total = (expected.values * expected.counts).double().abs().sum()
    assert ((h.values * h.counts).double().sum() - (expected.values * expected.counts).double().sum()).abs() <= 1e-5 * total
    again = observe(*reversed(batches), kind=ImageObserver).histogram(2.4)
    first = mine.histogram(2.4)
    assert torch.equal(first.values, again.values) and torch.equal(first.counts, again.counts)


def test_values_count_by_the_size_of_their_image():
    """An image 2^k times as large counts 2^(-k p) times as much; one much smaller than usual like one of a quarter."""
    x = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    x = x / x.square().mean(1, keepdim=True).sqrt() * torch.tensor([1.0, 1.0, 1.0, 8.0, 2.0**-20])[:, None]
    h = observe(x, kind=ImageObserver).histogram(2.0)
    assert h.low == x.min() and h.high == x.max()
    for image, weight in ((0, 1), (3, 1 / 64), (4, 16)):
        among = torch.isin(h.values[0], x[image])
        assert torch.allclose(h.counts[0][among], torch.tensor(float(weight)))
    assert h.counts.sum().isclose(torch.tensor(1000 * (3 + 1 / 64 + 16)), rtol=1e-5)


def test_few_images_with_enormous_values_do_not_decide_on_the_step():
    """One of 64 images is fifty times as large. Absolute errors make the step for them; relative ones, for the others."""
    x = torch.randn(64, 4000, generator=torch.Generator().manual_seed(0))
    wild = torch.cat([x[:63], 50 * x[63:]])
    tame = activation_quantizer(observe(x, kind=ImageObserver), QuantSpec(4))
    absolute, relative = (activation_quantizer(observe(wild, kind=ImageObserver), QuantSpec(4), relative=word) for word in (False, True))
    assert absolute.scale > 20 * tame.scale
    assert relative.scale < 1.5 * tame.scale
    for method in ("minmax", "percentile", "kl"):
        one, two = (activation_quantizer(observe(wild, kind=ImageObserver), QuantSpec(4), method, relative=word) for word in (False, True))
        assert one.scale == two.scale


def test_bins_of_weighted_values_lie_where_the_values_do():
    """Weights far below one: a bin holds the mean of its members, whatever they weigh together."""
    x = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    h = Histogram(x, torch.ones_like(x), x.amin(1), x.amax(1))
    light = Histogram(x, 1e-3 * torch.ones_like(x), x.amin(1), x.amax(1))
    torch.testing.assert_close(light.coarsen(64).values, h.coarsen(64).values)
    torch.testing.assert_close(light.coarsen(64).counts, 1e-3 * h.coarsen(64).counts)


def test_empty_images_do_not_say_what_is_usual():
    x = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    x[:3] = 0
    h = observe(x, kind=ImageObserver).histogram(2.4)
    assert torch.allclose(h.counts[h.values != 0].sum(), torch.tensor(2000.0), rtol=0.3)
    found = activation_quantizer(observe(x, kind=ImageObserver), QuantSpec(4), relative=True)
    assert found.scale.isclose(activation_quantizer(observe(x[3:], kind=ImageObserver), QuantSpec(4)).scale, rtol=0.1)
    nothing = activation_quantizer(observe(torch.zeros(3, 7), kind=ImageObserver), QuantSpec(4), relative=True)
    assert nothing.scale == 1


def test_images_whose_squares_are_too_large_for_their_dtype():
    x = torch.tensor([[1e30, -2e30], [1e-30, 1e-30]])
    h = observe(x, kind=ImageObserver).histogram()
    assert h.low == x.min() and h.high == x.max() and h.counts.sum() == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_images_leave_what_was_seen(bad):
    observer = observe(torch.ones(2, 3), kind=ImageObserver)
    for x in (torch.tensor([[1.0, bad]]), torch.zeros(0, 3)):
        with pytest.raises(CalibrationError, match=r"layer1\.conv: the activation holds"):
            observer(x)
    assert observer.histogram().counts.sum() == 6
    with pytest.raises(CalibrationError, match="bn: never saw data"):
        ImageObserver("bn").histogram()


def test_which_observer():
    assert isinstance(observer_of("relu", None), ImageObserver)
    found = observer_of("softmax", 1)
    assert isinstance(found, AxisObserver) and (found.name, found.axis) == ("softmax", 1)
    with pytest.raises(CalibrationError, match="softmax: never saw data"):
        found.histogram()
    with pytest.raises(CalibrationError, match="softmax: the activation holds NaN"):
        found(torch.full((1, 2), torch.nan))


def test_an_observer_of_an_axis_is_copied_with_what_it_saw():
    observer = AxisObserver("softmax", 1)
    observer(torch.rand(4, 2, 3).double())
    twin = copy.deepcopy(observer)
    twin(torch.rand(4, 2, 3).double() + 5)
    assert observer.histogram().high.max() < 1 < twin.histogram().high.min()
    assert observer.histogram().values.dtype == torch.float64
