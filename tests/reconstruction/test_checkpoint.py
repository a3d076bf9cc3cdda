"""Checkpoints: bit for bit on the way back, whole or not at all, and never of another run."""

from __future__ import annotations

import copy
import errno
import importlib
import json
import os
import pickletools
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, symbolic_trace

import fxquant
from fxquant.errors import FxquantError
from fxquant.files import write_whole
from fxquant.recipe import Recipe
from fxquant.reconstruction import checkpoint as module
from fxquant.reconstruction.checkpoint import FILE, CheckpointError, Checkpoints, Identity

RUN: dict[str, Any] = {"recipe": Recipe.FAST.to_dict(), "w": 2, "a": 4, "edges": "8bit", "overrides": {}, "seed": 0}
NAMES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"]
DTYPES = [getattr(torch, name) for name in NAMES]
TENSORS = {"unit.alpha": torch.arange(6.0).view(2, 3), "step": torch.tensor(7)}
STATE = {"unit": 3, "pass": "b", "losses": [0.1, 1e-30], "nested": {"a": None}}


def bits(value: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    return value.dtype, value.shape, value.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).tolist()


def identity(**changes: Any) -> Identity:
    run = changes.pop("settings", RUN)
    return Identity(**{"network": "n", "run": json.dumps(run), "images": "i", "version": "v", "settings": run, **changes})


def begun(folder: Path, **changes: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, identity(**changes), resume=False)
    checkpoints.save(TENSORS, STATE)
    return checkpoints


def check_there(folder: Path, tensors: dict[str, Tensor] = TENSORS, state: dict[str, Any] = STATE) -> None:
    assert [path.name for path in folder.iterdir()] == [FILE]
    found = Checkpoints(folder, identity(), resume=True).load()
    assert found is not None
    assert {name: bits(value) for name, value in found[0].items()} == {name: bits(value) for name, value in tensors.items()}
    assert found[1] == state


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def teacher(net) -> GraphModule:
    return symbolic_trace(net)


# There and back


@st.composite
def values(draw) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    numel = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    high = 2 if dtype == torch.bool else 256  # all bits, so NaN with their payloads too
    content = torch.randint(0, high, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    value = content.view(dtype).view(shape)
    match draw(st.sampled_from(["plain", "transposed", "strided", "expanded"])):
        case "transposed":
            return value.permute(tuple(reversed(range(value.ndim))))
        case "strided" if value.ndim:
            return value[..., ::2]
        case "expanded":
            return value.expand(3, *shape)
    return value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=6), values(), max_size=5), st.dictionaries(st.text(max_size=5), json_values, max_size=4)
)
def test_everything_comes_back(tensors, state):
    tensors.pop("__metadata__", None)
    with tempfile.TemporaryDirectory() as folder:
        Checkpoints(folder, identity(), resume=False).save(tensors, state)
        check_there(Path(folder), tensors, state)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.uint32, torch.uint64])
def test_rarer_types(folder, dtype):
    value = torch.arange(12).to(dtype).view(3, 4).t()
    tensors = {"a": value, "b": value.conj()} if dtype.is_complex else {"a": value}
    Checkpoints(folder, identity(), resume=False).save(tensors, {})
    check_there(folder, {name: value.resolve_conj() for name, value in tensors.items()}, {})


def test_shared_memory_and_parameters(folder):
    value = torch.nn.Parameter(torch.randn(4, 6))
    tensors = {"whole": value, "again": value, "row": value[1], "turned": value.t(), "tail": value.view(-1)[5:], "none": value[:0]}
    Checkpoints(folder, identity(), resume=False).save(tensors, {})
    check_there(folder, {name: part.detach() for name, part in tensors.items()}, {})


def test_what_is_loaded_is_ones_own(folder):
    checkpoints = begun(folder)
    found = Checkpoints(folder, identity(), resume=True).load()
    assert found is not None
    found[0]["unit.alpha"].zero_()
    check_there(folder)
    checkpoints.save({}, {})
    assert found[0]["step"] == 7


def test_the_last_one_counts(folder):
    checkpoints = begun(folder)
    checkpoints.save({"x": torch.zeros(3)}, {"unit": 4})
    check_there(folder, {"x": torch.zeros(3)}, {"unit": 4})
    resumed = Checkpoints(folder, identity(), resume=True)
    resumed.save({"x": torch.ones(3)}, {"unit": 5})
    check_there(folder, {"x": torch.ones(3)}, {"unit": 5})
    found = resumed.load()
    assert found is not None
    assert found[1] == {"unit": 5}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_from_a_gpu(folder):
    Checkpoints(folder, identity(), resume=False).save({name: value.cuda() for name, value in TENSORS.items()}, STATE)
    check_there(folder)


def test_saving_changes_nothing(folder):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.randn(2)}
    before = {name: (id(value), value.clone(), value.stride()) for name, value in tensors.items()}
    Checkpoints(folder, identity(), resume=False).save(tensors, STATE)
    for name, (place, value, stride) in before.items():
        assert (id(tensors[name]), tensors[name].stride()) == (place, stride)
        assert torch.equal(tensors[name], value)


def test_without_resume_what_is_there_is_not_replaced(folder):
    begun(folder)
    with pytest.raises(CheckpointError, match=r"there is a checkpoint already.* Go on from it with resume="):
        Checkpoints(folder, identity(network="other"), resume=False)
    check_there(folder)
    assert Checkpoints(folder.parent / "new", identity(), resume=False).load() is None


def test_nothing_is_pickled(folder):
    begun(folder)
    content = (folder / FILE).read_bytes()
    assert b"torch._utils" not in content
    with pytest.raises(Exception):  # noqa: B017, PT011
        list(pickletools.genops(content))


# Nothing stays behind


def test_remove(folder):
    begun(folder).remove()
    assert folder.parent.is_dir()
    assert not folder.exists()


def test_remove_in_a_later_process(folder):
    begun(folder)
    Checkpoints(folder, identity(), resume=True).remove()
    assert not folder.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_remove_keeps_a_folder_that_was_there(folder, resume):
    folder.mkdir(parents=True)
    checkpoints = begun(folder)
    (Checkpoints(folder, identity(), resume=True) if resume else checkpoints).remove()
    assert list(folder.iterdir()) == []


def test_remove_keeps_what_is_not_ours(folder):
    checkpoints = begun(folder)
    (folder / "notes.txt").write_text("mine")
    checkpoints.remove()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_remove_twice_and_without_a_save(folder):
    checkpoints = Checkpoints(folder, identity(), resume=False)
    checkpoints.remove()
    checkpoints.remove()
    assert not folder.exists()


def test_what_a_kill_left_is_cleared(folder):
    begun(folder)
    (folder / f".{FILE}.0123456789abcdef").write_bytes(b"half")
    check_there_after = Checkpoints(folder, identity(), resume=True)
    check_there(folder)
    (folder / f".{FILE}.0123456789abcdef").write_bytes(b"half")
    check_there_after.remove()
    assert not folder.exists()


# Interrupts and full disks


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    return fail


class HalfWritten:
    """A file that takes a few bytes and then no more."""

    def __init__(self, file: Any, error: BaseException):
        self.file, self.error = file, error

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(content[:10])
        self.file.flush()
        raise self.error


def break_at(monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException) -> None:
    if place == "write":
        files = importlib.import_module("fxquant.files")
        monkeypatch.setattr(files, "open", lambda *args: HalfWritten(open(*args), error), raising=False)  # noqa: SIM115
    else:
        monkeypatch.setattr(place, failing(error))


PLACES = ["write", "os.fsync", "pathlib.Path.replace"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_former_one(folder, monkeypatch, place, code):
    checkpoints = begun(folder)
    with monkeypatch.context() as patch:
        break_at(patch, place, OSError(code, os.strerror(code)))
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save({}, {"unit": 4, "losses": [1.0]})
    text = str(caught.value)
    assert text.startswith(f"{folder / FILE}: the checkpoint of unit 4 cannot be written: {os.strerror(code)} (it takes 0.00 GiB; ")
    assert "GiB free); nothing is lost: the checkpoint of unit 3, pass b is still there. Check the folder and the free space, then " in text
    check_there(folder)
    checkpoints.save({}, {"unit": 4})
    check_there(folder, {}, {"unit": 4})


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_at_the_first_save(folder, monkeypatch, place):
    checkpoints = Checkpoints(folder, identity(), resume=False)
    break_at(monkeypatch, place, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match=r"free\); nothing of this run is there yet\. .*choose another folder"):
        checkpoints.save(TENSORS, STATE)
    assert list(folder.iterdir()) == []


def test_a_full_disk_after_resuming(folder, monkeypatch):
    begun(folder)
    resumed = Checkpoints(folder, identity(), resume=True)
    break_at(monkeypatch, "write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match="the checkpoint of unit 3, pass b is still there"):
        resumed.save({}, {})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("former", [False, True])
def test_ctrl_c_keeps_the_former_one(folder, monkeypatch, place, former):
    checkpoints = begun(folder) if former else Checkpoints(folder, identity(), resume=False)
    with monkeypatch.context() as patch:
        break_at(patch, place, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save({}, {})
    if former:
        check_there(folder)
    else:
        assert list(folder.iterdir()) == []


def test_the_folder_goes_away(folder):
    checkpoints = begun(folder)
    (folder / FILE).unlink()
    folder.rmdir()
    with pytest.raises(CheckpointError, match="the checkpoint of unit 3, pass b cannot be written: No such file or directory"):
        checkpoints.save(TENSORS, STATE)
    checkpoints.remove()


def test_write_whole_replaces_and_raises_as_it_came(tmp_path):
    path = tmp_path / "file"
    for content in (b"one", b""):
        write_whole(path, content)
        assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "file", b"")
    assert list(tmp_path.iterdir()) == [path]


# Folders that cannot be


@pytest.mark.parametrize("inside", ["", "deeper"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_of_that_name(tmp_path, inside, resume):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(CheckpointError):
        Checkpoints(tmp_path / "file" / inside, identity(), resume)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_the_message_names_the_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"file: no checkpoint can be written there: Not a directory. Give a folder that can"):
        Checkpoints(tmp_path / "file", identity(), resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_takes_no_file(folder, monkeypatch, resume):
    if resume:
        begun(folder)
    monkeypatch.setattr(module.tempfile, "TemporaryFile", failing(PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
    with pytest.raises(CheckpointError, match=r"one: no checkpoint can be written there: Permission denied"):
        Checkpoints(folder, identity(), resume)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("inside", ["", "deeper"])
def test_an_unwritable_folder(tmp_path, inside):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(CheckpointError, match="no checkpoint can be written there: Permission denied"):
            Checkpoints(tmp_path / inside, identity(), resume=False)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


# Nothing to resume from, or something else


def test_nothing_to_resume_from(folder):
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(folder, identity(), resume=True)
    text = f"{folder / FILE}: there is no checkpoint to resume from: none has been written, or the run was finished. Begin with "
    assert str(caught.value) == f"{text}checkpoint={str(folder)!r} and without resume."
    assert not folder.exists()


def test_the_file_goes_away_before_it_is_loaded(folder):
    begun(folder)
    resumed = Checkpoints(folder, identity(), resume=True)
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint to resume from"):
        resumed.load()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("network", r"the network differs \(its graph or its weights\)\. Load the weights that the run was begun with\."),
        ("images", r"the calibration images differ\. Give the same images in the same order \(no shuffling, or the same seed\)\."),
        ("version", r"the version differs \(w wrote it, this is v\)\. Install the version that wrote it\."),
    ],
)
def test_another_run(folder, part, said):
    begun(folder, **{part: "w"})
    content = (folder / FILE).read_bytes()
    with pytest.raises(CheckpointError, match=f"is of another run: {said} Or delete it and begin anew without resume") as caught:
        Checkpoints(folder, identity(), resume=True)
    assert str(caught.value).startswith(f"{folder / FILE}: ")
    assert (folder / FILE).read_bytes() == content


def said_of(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> str:
    begun(folder, settings=there)
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(folder, identity(settings=here), resume=True)
    return caught.value.problem


def test_another_recipe_is_named_by_field(folder):
    other = {**RUN, "recipe": Recipe.FAST.replace(name="fast", weight_p=2.0).to_dict(), "overrides": {"fc": {"w": 8}}, "edges": None}
    said = "recipe.weight_p was 2.4, is 2.0; edges was '8bit', is None; overrides was {}, is not there; overrides.fc.w was not there, is 8"
    assert said_of(folder, RUN, other) == f"is of another run: the recipe differs ({said})"


def test_numbers_are_told_from_truth_values(folder):
    assert said_of(folder, {"w": 1}, {"w": True}) == "is of another run: the recipe differs (w was 1, is True)"


def test_the_order_of_overrides_counts(folder):
    one = {"overrides": {"a*": {"w": 2}, "*b": {"w": 4}}}
    other = {"overrides": {"*b": {"w": 4}, "a*": {"w": 2}}}
    assert said_of(folder, one, other) == "is of another run: the recipe differs (in the order of its fields)"


def test_many_fields_are_counted(folder):
    said = said_of(folder, {f"f{n}": 0 for n in range(20)}, {f"f{n}": 1 for n in range(20)})
    assert "f7 was 0, is 1; and 12 more fields)" in said
    assert "f8" not in said


def test_everything_differs(folder):
    begun(folder, **dict.fromkeys(["network", "run", "images", "version"], "w"))
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(folder, identity(), resume=True)
    assert [word in str(caught.value) for word in ("network differs", "recipe differs", "images differ", "version differs")] == [True] * 4


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated(folder, share):
    begun(folder)
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"is damaged, truncated, or no checkpoint \(.+\). Delete it and begin anew without resume"):
        Checkpoints(folder, identity(), resume=True)


def test_every_byte_is_checked(folder):
    begun(folder)
    content = (folder / FILE).read_bytes()
    noticed = 0
    for place in range(len(content)):
        (folder / FILE).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = Checkpoints(folder, identity(), resume=True).load()
        except CheckpointError as error:
            assert "is damaged, truncated, or no checkpoint" in str(error)  # noqa: PT017
            noticed += 1
            continue
        assert found is not None
        assert {name: bits(value) for name, value in found[0].items()} == {name: bits(value) for name, value in TENSORS.items()}
        assert found[1] == STATE
    assert noticed >= len(content) - 8, "the rest is padding"


@pytest.mark.parametrize("metadata", [None, {"fxquant": "{}"}, {"fxquant.checkpoint": "{"}, {"fxquant.checkpoint": "[]", "header": ""}])
def test_a_file_of_something_else(folder, metadata):
    folder.mkdir(parents=True)
    safetensors.torch.save_file({"x": torch.zeros(2)}, folder / FILE, metadata)
    with pytest.raises(CheckpointError, match="is damaged, truncated, or no checkpoint"):
        Checkpoints(folder, identity(), resume=True)


def test_a_pickled_file_is_not_opened(folder):
    folder.mkdir(parents=True)
    torch.save({"x": torch.zeros(2)}, folder / FILE)
    with pytest.raises(CheckpointError, match="is damaged, truncated, or no checkpoint"):
        Checkpoints(folder, identity(), resume=True)


def test_a_later_format_is_a_matter_of_version(folder, monkeypatch):
    monkeypatch.setattr(module, "_PARTS", {"version": "", "run": ""})
    begun(folder, version="fxquant 9, format 2")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"the version differs \(fxquant 9, format 2 wrote it, this is v\)"):
        Checkpoints(folder, identity(), resume=True)


# What a run is


def test_the_same_run_is_the_same(teacher, images, untouched):
    with untouched(teacher):
        one = Identity.of(teacher, RUN, images)
    other = Identity.of(copy.deepcopy(teacher), json.loads(json.dumps(RUN)), [image.clone() for image in images])
    assert one == other
    assert one.version == f"fxquant {fxquant.__version__}, torch {torch.__version__}, format 3"
    assert one.settings == RUN
    assert len({one.network, one.run, one.images}) == 3
    assert all(len(part) == 64 for part in (one.network, one.run, one.images))


def test_a_traced_network_has_the_same_identity_twice(net, images):
    one, other = (Identity.of(fxquant.trace(network, images[0]), RUN, images) for network in (net, copy.deepcopy(net)))
    assert one == other


def test_every_weight_counts(teacher, images):
    before = Identity.of(teacher, RUN, images)
    for value in [*teacher.parameters(), *teacher.buffers()]:
        kept = value.detach().clone()
        with torch.no_grad():
            value.view(-1)[-1:].add_(1)
        changed = Identity.of(teacher, RUN, images)
        assert changed.network != before.network
        assert (changed.run, changed.images) == (before.run, before.images)
        with torch.no_grad():
            value.copy_(kept)
    assert Identity.of(teacher, RUN, images) == before


def test_the_graph_counts(teacher, images):
    other = copy.deepcopy(teacher)
    for node in other.graph.nodes:
        if node.op == "call_module" and str(node.target) == "act":
            node.replace_all_uses_with(node.args[0])
    other.recompile()
    assert Identity.of(other, RUN, images).network != Identity.of(teacher, RUN, images).network


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 8), st.integers(0, 11))
def test_images_count_and_not_their_batches(sizes, image, pixel):
    teacher = symbolic_trace(torch.nn.Identity())
    images = torch.arange(9 * 12.0).view(9, 3, 2, 2)
    cuts = [size for size in sizes if size < 9]
    batches = images.tensor_split(sorted(cuts))
    before = Identity.of(teacher, {}, [images])
    assert Identity.of(teacher, {}, batches) == before
    assert Identity.of(teacher, {}, [images.contiguous(memory_format=torch.channels_last)]) == before
    images[image].view(-1)[pixel] += 1
    for changed in ([images], [images[:8]], [images.double()], [images.view(9, 3, 4, 1)], [images.flip(0)]):
        found = Identity.of(teacher, {}, changed)
        assert found.images != before.images
        assert (found.network, found.run) == (before.network, before.run)


def test_settings_count(teacher, images):
    runs = [RUN, {**RUN, "seed": 1}, {**RUN, "w": None}, {**RUN, "overrides": {"fc": {"w": 8}}}, {**RUN, "overrides": {"*": {"w": 8}}}]
    assert len({Identity.of(teacher, run, images).run for run in runs}) == len(runs)
    assert len({Identity.of(teacher, run, images).network for run in runs}) == 1


def test_settings_that_mean_the_same(teacher, images):
    one, other = (Identity.of(teacher, run, images) for run in ({"p": 2.0, "t": (1, 2), "big": 1e300}, {"p": 2, "t": [1, 2], "big": 1e300}))
    assert one == other
    assert one.settings == {"p": 2, "t": [1, 2], "big": 1e300}


def test_a_whole_run(folder, teacher, images):
    Checkpoints(folder, Identity.of(teacher, RUN, images), resume=False).save(TENSORS, STATE)
    resumed = Checkpoints(str(folder), Identity.of(teacher, RUN, images), resume=True)
    found = resumed.load()
    assert found is not None
    assert found[1] == STATE
    changed = {**RUN, "recipe": {**RUN["recipe"], "weight_p": 2.5}, "seed": 3}
    with pytest.raises(CheckpointError, match=r"the recipe differs \(recipe.weight_p was 2.4, is 2.5; seed was 0, is 3\)\. Repeat"):
        Checkpoints(folder, Identity.of(teacher, changed, images), resume=True)
    resumed.remove()
    assert not folder.exists()


def test_the_error_is_one_of_fxquant():
    assert issubclass(CheckpointError, FxquantError)
