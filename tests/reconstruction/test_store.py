"""What is read is what was put, wherever it was kept meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import ConfigError
from fxquant.reconstruction import store as module
from fxquant.reconstruction.store import Store

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
BUDGETS = {"memory": 1e9, "disk": 0.0}


def make(count: int = 6, budget: float = 1e9, **options) -> Store:
    return Store(count, CPU, budget, **options)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))


@st.composite
def tensors(draw, dtypes=DTYPES) -> Tensor:
    shape = [draw(st.integers(1, 9)), *draw(st.lists(st.integers(1, 4), max_size=3))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    value = 100 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return (value > 0 if (dtype := draw(st.sampled_from(dtypes))) == torch.bool else value.abs().to(dtype)).unsqueeze(-1)


def split(value: Tensor, cuts: list[int]) -> Iterator[Tensor]:
    """Yield the rows in uneven batches, one of them empty."""
    ends = sorted(cut % (len(value) + 1) for cut in cuts)
    yield from (value[a:b] for a, b in zip([0, *ends], [*ends, len(value)], strict=True))


# What is put comes back


@settings(deadline=None)
@given(tensors(), st.lists(st.integers(0, 9), max_size=4), st.sampled_from(sorted(BUDGETS)), st.integers(1, 10), st.data())
def test_rows_and_batches_are_those_that_were_put(value, cuts, budget, size, data):
    store = make(len(value), BUDGETS[budget])
    store.put("x", split(value, cuts))
    assert store.places == {"x": "host" if budget == "memory" else "disk"}
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(value) - 1), max_size=12)), dtype=torch.int64)
    assert same(store.rows("x", index), value[index])
    batches = list(store.batches("x", size))
    assert [len(batch) for batch in batches] == [len(batch) for batch in value.split(size)]
    assert same(torch.cat(batches), value)


@settings(deadline=None)
@given(tensors([torch.float32, torch.float64]), st.sampled_from(sorted(BUDGETS)))
def test_bfloat16_costs_two_bytes_and_half_a_step(value, budget):
    store = make(len(value), BUDGETS[budget], dtype=torch.bfloat16)
    store.put("x", [value])
    back = store.rows("x", torch.arange(len(value)))
    assert back.dtype == value.dtype
    assert store.bytes == 2 * value.numel()
    assert ((back - value).abs() <= value.abs() * 2**-8).all()
    assert same(torch.cat(list(store.batches("x", 2))), back)
    again = make(len(value), dtype=torch.bfloat16)
    again.put("x", [back])
    assert same(again.rows("x", torch.arange(len(value))), back)


@settings(deadline=None)
@given(tensors([torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]))
def test_what_is_no_wide_float_is_stored_as_it_is(value):
    store = make(len(value), dtype=torch.bfloat16)
    store.put("x", [value])
    assert store.bytes == value.numel() * value.element_size()
    assert same(store.rows("x", torch.arange(len(value))), value)


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_not_finite_stays_so(budget):
    value = torch.tensor([[float("nan"), float("inf")], [-float("inf"), -0.0]])
    store = make(2, BUDGETS[budget], dtype=torch.bfloat16)
    store.put("x", [value])
    assert same(store.rows("x", torch.arange(2)).nan_to_num(nan=1.5), value.nan_to_num(nan=1.5))


@pytest.mark.parametrize("budget", BUDGETS)
def test_writing_into_what_was_read_changes_nothing(budget):
    value = torch.randn(6, 3)
    store = make(budget=BUDGETS[budget])
    store.put("x", [value])
    for part in (*store.batches("x", 6), store.rows("x", torch.arange(6))):
        part.zero_()
    assert torch.equal(store.rows("x", torch.arange(6)), value)


@pytest.mark.parametrize("budget", BUDGETS)
def test_writing_into_what_was_put_changes_nothing(budget):
    value = torch.randn(6, 3)
    kept = value.clone()
    store = make(budget=BUDGETS[budget])
    store.put("x", [value])
    value.zero_()
    assert torch.equal(store.rows("x", torch.arange(6)), kept)


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_read_outlives_the_store(budget):
    value = torch.randn(6, 3)
    store = make(budget=BUDGETS[budget])
    store.put("x", [value])
    rows, batches = store.rows("x", torch.arange(6)), store.batches("x", 4)
    first = next(batches)
    store.drop("x")
    assert torch.equal(rows, value)
    assert torch.equal(torch.cat([first, *batches]), value)
    del store
    assert torch.equal(rows, value)


def test_batches_may_be_made_from_what_is_stored():
    store = make(budget=6 * 3 * 4)
    value = torch.randn(6, 3)
    store.put("x", [value])
    store.put("y", (batch.relu() for batch in store.batches("x", 4)))
    assert store.places == {"x": "host", "y": "disk"}
    assert torch.equal(store.rows("y", torch.tensor([5])), value[5:].relu())


def test_gradients_are_not_kept():
    store = make()
    weight = torch.ones(3, requires_grad=True)
    store.put("x", [torch.randn(6, 3) * weight])
    assert not store.rows("x", torch.arange(6)).requires_grad
    assert not next(store.batches("x", 6)).requires_grad


def test_what_was_put_in_inference_mode_can_be_learned_from():
    store = make()
    with torch.inference_mode():
        store.put("x", [torch.randn(6, 3)])
    weight = torch.ones(3, requires_grad=True)
    (store.rows("x", torch.arange(6)) * weight).sum().backward()
    (next(store.batches("x", 6)) * weight).sum().backward()
    assert weight.grad is not None


def test_memory_layout_does_not_matter():
    value = torch.randn(6, 4, 5, 3).to(memory_format=torch.channels_last).transpose(1, 2)
    store = make(budget=0)
    store.put("x", value.split(4))
    assert torch.equal(store.rows("x", torch.tensor([3, 3, 0])), value[[3, 3, 0]])


# The budget


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.booleans()), max_size=25), st.integers(0, 400))
def test_memory_stays_within_the_budget(steps, budget):
    store = make(2, budget)
    held: dict[str, int] = {}
    peak = 0
    for number, width, drop in steps:
        name = f"t{number}"
        if name in held:
            if drop:
                store.drop(name)
                del held[name]
            continue
        room = store.memory + 8 * width <= budget
        store.put(name, [torch.zeros(2, width)])
        held[name] = 8 * width
        peak = max(peak, sum(held.values()))
        assert store.places[name] == ("host" if room else "disk")
        assert store.memory <= budget
        assert (store.names, store.bytes, store.peak) == (list(held), sum(held.values()), peak)
    assert store.memory == sum(held[name] for name, place in store.places.items() if place == "host")


def test_drop_makes_room():
    store = make(budget=6 * 4)
    store.put("a", [torch.zeros(6)])
    store.put("b", [torch.zeros(6)])
    store.drop("a")
    store.put("c", [torch.zeros(6)])
    assert store.places == {"b": "disk", "c": "host"}
    for name in store.names:
        store.drop(name)
    assert (store.names, store.bytes, store.memory, store.peak, store.places) == ([], 0, 0, 48, {})


def test_nothing_is_copied_twice_to_be_joined():
    """At the peak there is the tensor and one batch, not the tensor and all batches."""
    seen = []
    store = make(64)

    def batches() -> Iterator[Tensor]:
        for _ in range(8):
            seen.append(store.bytes)
            yield torch.zeros(8, 100)

    store.put("x", batches())
    assert seen == [0, *[64 * 100 * 4] * 7]


# Files


@pytest.mark.skipif(sys.platform == "win32", reason="an open file has a name there")
def test_no_file_has_a_name(tmp_path):
    store = make(budget=0, folder=tmp_path)
    store.put("x", (batch for batch in torch.randn(6, 3).split(2) if not list(tmp_path.iterdir())))
    assert list(tmp_path.iterdir()) == []
    assert store.places == {"x": "disk"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_drop_gives_the_file_back(tmp_path):
    def mapped() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]

    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    store = make(budget=0, folder=tmp_path)
    store.put("x", [torch.zeros(6, 10_000)])
    assert mapped()
    store.drop("x")
    assert mapped() == []
    assert opened() == before
    with pytest.raises(ConfigError):
        store.put("x", [torch.zeros(5, 10_000)])
    assert mapped() == []
    assert opened() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a killed process may leave its temporary files")
def test_a_kill_leaves_no_file(tmp_path):
    code = """
        import os, signal, sys, torch
        from fxquant.reconstruction.store import Store
        store = Store(6, torch.device("cpu"), 0, folder=sys.argv[1])
        store.put("x", [torch.zeros(6, 10_000)])
        print(store.places, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "{'x': 'disk'}\n"
    assert list(tmp_path.iterdir()) == []


def test_files_go_to_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert make().folder == tmp_path


def test_a_full_disk(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    store = make(6, 2**29, folder=tmp_path)
    store.put("layer1", [torch.zeros(6, 2)])
    with pytest.raises(ConfigError) as caught:
        store.put("layer2", [torch.zeros(1).expand(6, 2**26)])
    text = str(caught.value)
    assert text.startswith("Recipe.memory_gib: 'layer2' takes 1.50 GiB, which is beyond it (0.00 GiB of 0.50 GiB are held), and ")
    assert f"{tmp_path} does not take it either (No space left on device; " in text
    assert (
        " GiB free). Free disk space, or set the environment variable TMPDIR to a folder on a larger disk, and go on with resume " in text
    )
    assert store.names == ["layer1"]
    assert store.bytes == store.peak == 48
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(store.rows("layer1", torch.arange(6)), torch.zeros(6, 2))


def test_a_file_that_may_not_be_so_long():
    """No simulation: the system refuses."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = make(budget=0)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(ConfigError, match=r"does not take it either \(File too large; "):
            store.put("x", [torch.zeros(6, 10_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    store.put("x", [torch.zeros(6, 10_000)])
    assert store.places == {"x": "disk"}


@pytest.mark.parametrize("how", ["missing", "refused"])
def test_without_posix_fallocate(tmp_path, monkeypatch, how):
    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if how == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    value = torch.randn(6, 1000)
    store = make(budget=0, folder=tmp_path)
    store.put("x", value.split(4))
    assert torch.equal(store.rows("x", torch.arange(6)), value)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(ConfigError, match=r"No space left on device; 0\.00 GiB free"):
        store.put("y", [value])


def test_a_folder_that_is_none(tmp_path):
    store = make(budget=0, folder=tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"missing does not take it either \(No such file or directory; free space unknown\)"):
        store.put("x", [torch.zeros(6)])


# A GPU


class FakeCuda:
    """Free bytes, as torch tells them, and a device on which nothing can be allocated here."""

    def __init__(self, monkeypatch, free: int, total: int, kept: int = 0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: kept + 10)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
        self.asked: list[torch.device] = []
        self.full = False
        empty = torch.empty

        def allocate(*args, device, **options):
            if torch.device(device).type == "cuda":
                self.asked.append(torch.device(device))
                if self.full:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return empty(*args, device="cpu", **options)

        monkeypatch.setattr(torch, "empty", allocate)


@pytest.mark.parametrize(
    ("free", "kept", "budget", "place"),
    [
        *((124, 0, 30, "device"), (123, 0, 30, "host"), (100, 24, 30, "device"), (100, 23, 30, "host"), (400, 0, 30, "device")),
        *((224, 0, 100, "device"), (223, 0, 100, "host")),
    ],
)
def test_a_quarter_of_the_gpu_and_twice_the_budget_stay_free(monkeypatch, free, kept, budget, place):
    FakeCuda(monkeypatch, free, 400, kept)
    store = Store(6, torch.device("cuda", 0), budget)
    store.put("x", [torch.zeros(6)])
    assert store.places == {"x": place}


def test_what_a_gpu_holds_is_outside_the_budget(monkeypatch):
    cuda = FakeCuda(monkeypatch, 1000, 1000)
    store = Store(6, torch.device("cuda", 0), 24)
    store.put("x", [torch.zeros(6)])
    store.put("y", [torch.zeros(6)])
    cuda.full = True
    store.put("z", [torch.zeros(6)])
    store.put("beyond", [torch.zeros(6)])
    assert store.places == {"x": "device", "y": "device", "z": "host", "beyond": "disk"}
    assert (store.memory, store.bytes, store.peak) == (24, 96, 96)


def test_a_gpu_in_pieces_falls_back_to_the_host(monkeypatch):
    cuda = FakeCuda(monkeypatch, 1000, 1000)
    cuda.full = True
    store = Store(6, torch.device("cuda", 0), 24)
    store.put("x", [torch.zeros(6)])
    assert store.places == {"x": "host"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_on_a_gpu(dtype, monkeypatch):
    device = torch.device("cuda", 0)
    value = torch.randn(6, 50).bfloat16().float()
    store = Store(6, device, 2 * 6 * 50 * (4 if dtype is None else 2), dtype)
    store.put("device", value.split(4))
    monkeypatch.setattr(module, "_room", lambda device, budget: 0)
    store.put("host", value.to(device).split(4))
    store.put("disk", value.to(device).split(4))
    assert store.places == {name: name for name in ("device", "host", "disk")}
    for name in store.names:
        for index in (torch.tensor([5, 0, 5]), torch.tensor([5, 0, 5], device=device)):
            rows = store.rows(name, index)
            assert rows.device == device
            assert same(rows.cpu(), value[[5, 0, 5]])
        parts = list(store.batches(name, 4))
        assert all(part.device == device for part in parts)
        assert same(torch.cat(parts).cpu(), value)


# What cannot be meant


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("rows", "text"),
    [((2, 3), "the batches hold 5 rows"), ((4, 4), "the batches hold more than 6 rows"), ((), "the batches hold 0 rows")],
)
def test_wrong_number_of_rows(budget, rows, text):
    store = make(budget=BUDGETS[budget])
    with pytest.raises(ConfigError, match=f"^x: {text}, there are 6 images. Store one row an image"):
        store.put("x", (torch.zeros(n, 3) for n in rows))
    assert (store.names, store.bytes) == ([], 0)
    store.put("x", [torch.zeros(6, 3)])


@pytest.mark.parametrize("second", [torch.zeros(3, 1), torch.zeros(3, 2).double(), torch.zeros(3), torch.zeros(3, 1, 2)])
def test_batches_that_differ(second):
    store = make()
    with pytest.raises(ConfigError, match=r"x: a batch holds rows \[.*\] of torch.float\d\d, the first one \[2\] of torch.float32. Give"):
        store.put("x", [torch.zeros(3, 2), second])
    assert store.names == []


def test_a_number_is_no_batch():
    with pytest.raises(ConfigError, match=r"^x: a batch is one number"):
        make().put("x", [torch.tensor(1.0)])


def test_a_name_that_is_taken():
    store = make()
    store.put("x", [torch.ones(6)])
    with pytest.raises(ConfigError, match=r"^x: is stored already. Drop it first"):
        store.put("x", [torch.zeros(6)])
    assert torch.equal(store.rows("x", torch.arange(6)), torch.ones(6))


def test_a_name_that_is_unknown():
    store = make()
    for use in (store.drop, lambda name: store.rows(name, torch.arange(2)), lambda name: next(store.batches(name, 2))):
        with pytest.raises(ConfigError, match=r"^x: is not stored. Stored are: none"):
            use("x")
    store.put("y", [torch.zeros(6)])
    with pytest.raises(ConfigError, match="Stored are: 'y'"):
        store.drop("x")


def test_a_row_that_is_not_there():
    store = make()
    store.put("x", [torch.zeros(6)])
    with pytest.raises(IndexError):
        store.rows("x", torch.tensor([6]))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failure_while_batches_are_made_keeps_nothing(budget, error):
    def batches() -> Iterator[Tensor]:
        yield torch.zeros(3, 2)
        raise error

    store = make(budget=BUDGETS[budget])
    with pytest.raises(type(error)):
        store.put("x", batches())
    assert (store.names, store.bytes) == ([], 0)
