"""Files: bit-identical on the way back, small, and never half-loaded or half-written."""

from __future__ import annotations

import copy
import json
import os
import pickletools
import stat
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from torch import Tensor, nn

import fxquant
from fxquant.cat import CAT, fit_cat
from fxquant.passes import AppendCAT
from fxquant.quantizers.layers import QuantizedLayer


class Functional(nn.Module):
    """Convolution and linear layer as functions over parameters of the network's own."""

    def __init__(self):
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(6, 3, 3, 3) / 5), nn.Parameter(torch.randn(6))
        self.weight = nn.Parameter(torch.randn(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.conv2d(x, self.kernel, self.bias, stride=2)).mean((2, 3)), self.weight)


class Tied(nn.Module):
    """Two layers that share a weight, and one layer called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 10)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(F.relu(self.a(self.stem(x)))))))
        return self.fc(x.mean((2, 3)))


class Transposed(nn.Module):
    """Down and up again, in two groups, with batch norms to fold and no biases."""

    def __init__(self):
        super().__init__()
        self.down, self.bn1 = nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.up, self.bn2 = nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn2(self.up(F.relu(self.bn1(self.down(x)))))).mean((2, 3)))


class NormAct(nn.Module):
    """timm's batch norm with the activation inside."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, bias=False), timm.layers.BatchNormAct2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


NETS = {"functional": Functional, "tied": Tied, "transposed": Transposed, "norm_act": NormAct}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[name]().eval()


def quantize(model: nn.Module, images: list[Tensor], *args, **options) -> torch.fx.GraphModule:
    return fxquant.quantize(model, images, *args, **{"progress": False, "cat": False, "recipe": "fast", **options})


def check_round_trip(quantized: nn.Module, path: Path, architecture: nn.Module, images: list[Tensor]) -> torch.fx.GraphModule:
    fxquant.save(quantized, path)
    loaded = fxquant.load(path, architecture)
    mine, theirs = loaded.state_dict(), getattr(quantized, "_orig_mod", quantized).state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    for batch in (images[0], images[1][:1]):
        assert torch.equal(loaded(batch.to(next(iter(mine.values())).dtype)), quantized(batch.to(next(iter(mine.values())).dtype)))
    assert not any(module.training for module in loaded.modules())
    assert not any(value.requires_grad for value in loaded.parameters())
    assert json.dumps(fxquant.report(loaded).to_dict()) == json.dumps(fxquant.report(quantized).to_dict())
    return loaded


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


# There and back


@pytest.mark.parametrize(("w", "a"), [(2, 2), (3, 3), (4, 8), (5, 4), (6, None), (7, 7), (8, 8), (None, 4)])
def test_bit_widths(net, make_net, images, path, w, a):
    check_round_trip(quantize(net, images, w, a, edges="same"), path, make_net(seed=1), images)


@pytest.mark.parametrize("edges", ["8bit", "brecq", "same", "float", "integer"])
def test_edges(net, make_net, images, path, edges):
    check_round_trip(quantize(net, images, edges=edges), path, make_net(seed=1), images)


def test_overrides_and_recipe(net, make_net, images, path):
    recipe = fxquant.Recipe.FAST.replace(weight_symmetric=True, activation_symmetric=True, weight_p=2.0)
    quantized = quantize(net, images, overrides={"blocks.*": {"w": 5}, "fc": {"w": None, "a": None}}, recipe=recipe)
    loaded = check_round_trip(quantized, path, make_net(seed=1), images)
    assert fxquant.report(loaded).record.recipe == recipe


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("cat", [False, "paper"])
def test_other_networks(images, path, name, cat):
    network = make(name)
    check_round_trip(quantize(network, images, 4, 4, cat=cat), path, network, images)
    check_round_trip(quantize(network, images, 3, 3, cat=cat), path, make(name, seed=1), images)


def test_appended_cat(net, make_net, images, path):
    loaded = check_round_trip(quantize(net, images, cat="paper"), path, make_net(seed=1), images)
    assert sum(isinstance(module, CAT) for module in loaded.modules()) == 1


@pytest.mark.parametrize("edges", ["8bit", "float"])
def test_folded_cat(net, make_net, images, path, edges):
    quantized = quantize(net, images, edges=edges)
    cat = fit_cat(quantized(torch.cat(images)), net(torch.cat(images)).detach(), fit="kl", clusters=1, alpha=0.5)
    folded = AppendCAT(cat)(quantized).graph_module
    assert not any(isinstance(module, CAT) for module in folded.modules())
    check_round_trip(folded, path, make_net(seed=1), images)


def test_append_cat_afterwards(net, make_net, images, path):
    corrected = fxquant.append_cat(quantize(net, images), net, images, fit="moments", clusters=4, progress=False)
    loaded = check_round_trip(corrected, path, make_net(seed=1), images)
    assert fxquant.report(loaded).record.cat["clusters"] == 4


def test_float64(make_net, images, path):
    check_round_trip(quantize(make_net().double(), images, cat="paper"), path, make_net(seed=1), images)


def test_several_times(net, make_net, images, path):
    quantized = quantize(net, images, cat="paper")
    fxquant.save(quantized, path)
    once = path.read_bytes()
    fxquant.save(fxquant.load(path, make_net(seed=1)), path)
    assert path.read_bytes() == once


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, copy.deepcopy])
def test_wrapped(net, images, path, wrap):
    quantized = quantize(net, images)
    fxquant.save(wrap(quantized), path)
    assert torch.equal(fxquant.load(path, net)(images[0]), quantized(images[0]))


def test_loading_into_a_wrapped_or_traced_network(net, images, path, untouched):
    quantized = quantize(net, images)
    fxquant.save(quantized, path)
    traced = fxquant.trace(net, images[0])
    for architecture in (torch.compile(net), nn.DataParallel(net), traced, copy.deepcopy(traced).double()):
        with untouched(architecture):
            assert torch.equal(fxquant.load(path, architecture)(images[0]), quantized(images[0]))


def test_loading_never_edits_the_network(net, make_net, images, path, untouched, random_states):
    quantized = quantize(net, images)
    fxquant.save(quantized, path)
    architecture = make_net(seed=1).train()
    before = random_states()
    with untouched(architecture):
        loaded = fxquant.load(path, architecture)
    assert random_states() == before
    assert torch.equal(loaded(images[0]), quantized(images[0]))
    mine = {value.untyped_storage().data_ptr() for value in loaded.state_dict().values()}
    assert not mine & {value.untyped_storage().data_ptr() for value in architecture.state_dict().values()}


def test_weights_of_the_architecture_do_not_matter(net, make_net, images, path):
    """Those of a network that was made empty may be anything, NaN too."""
    quantized = quantize(net, images)
    empty = make_net(3)
    with torch.no_grad():
        for value in empty.parameters():
            value.fill_(float("nan"))
    check_round_trip(quantized, path, empty, images)


def test_saving_never_edits_the_network(net, images, path, untouched):
    quantized = quantize(net, images, cat="paper")
    with untouched(quantized):
        fxquant.save(quantized, path)


def test_compiles_after_loading(net, images, path):
    quantized = quantize(net, images, cat="paper")
    fxquant.save(quantized, path)
    compiled = torch.compile(fxquant.load(path, net), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images[0]), quantized(images[0]), atol=1e-5)


# Small, and nothing but numbers


def test_weights_are_dense(net, images, path):
    quantized = quantize(net, images, overrides={"blocks.0.2.*": {"w": 3}})
    fxquant.save(quantized, path)
    with safe_open(path, "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
        assert {file.get_tensor(name).dtype for name in sizes if name.endswith((".weight", ".zero_point"))} == {torch.uint8}
    numel = 8 * 8 * 3 * 3
    assert sizes["blocks.0.0.0.weight"] == numel * 2 // 8
    assert sizes["blocks.0.2.0.weight"] == numel * 3 // 8
    assert sizes["fc.weight"] == 80


def test_reported_bytes_are_those_in_the_file(net, images, path):
    quantized = quantize(net, images)
    fxquant.save(quantized, path)
    with safe_open(path, "pt") as file:
        for row in fxquant.report(quantized).record.layers:
            parts = [file.get_tensor(name) for name in file.keys() if name.startswith(f"{row.name}.")]  # noqa: SIM118
            assert row.bytes == sum(part.numel() * part.element_size() for part in parts)


def test_two_bits_take_less_than_four(make_net, images, path):
    sizes = []
    for bits in (2, 4, 8):
        fxquant.save(quantize(make_net(width=48), images[:1], bits, bits), path)
        sizes.append(path.stat().st_size)
    assert sizes == sorted(sizes)
    weights = 2 * 48 * 48 * 9
    assert sizes[1] - sizes[0] == pytest.approx(weights * 2 / 8, rel=0.05)
    assert sizes[2] - sizes[1] == pytest.approx(weights * 4 / 8, rel=0.05)


@pytest.mark.slow
def test_resnet18_takes_an_eleventh(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "float.pt")
    quantized = fxquant.quantize(network, [torch.randn(16, 3, 64, 64)], recipe="fast", progress=False)
    fxquant.save(quantized, tmp_path / "quantized.safetensors")
    before, after = ((tmp_path / name).stat().st_size for name in ("float.pt", "quantized.safetensors"))
    print(f"float {before:,} bytes, W2 {after:,} bytes, ratio {before / after:.2f}")
    assert after <= before / 11
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(
        fxquant.load(tmp_path / "quantized.safetensors", torchvision.models.resnet18(weights=None))(images), quantized(images)
    )


def test_nothing_is_pickled(net, images, path):
    fxquant.save(quantize(net, images, cat="paper"), path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert json.loads(header["__metadata__"]["fxquant"])["version"] == 1
    assert b"torch._utils" not in content
    with pytest.raises(Exception):  # noqa: B017, PT011
        list(pickletools.genops(content))


# Files that are none, or not ours


def check_refused(path: Path, architecture: nn.Module, match: str, untouched) -> None:
    with untouched(architecture), pytest.raises(fxquant.StorageError, match=match) as caught:
        fxquant.load(path, architecture)
    assert str(path) in str(caught.value)


def test_truncated(net, images, path, untouched):
    fxquant.save(quantize(net, images), path)
    content = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, *range(500, len(content), 1500), len(content) - 1}:
        path.write_bytes(content[:length])
        check_refused(path, net, "is damaged, truncated, or no safetensors file", untouched)


def test_flipped_bits(net, images, path, untouched):
    fxquant.save(quantize(net, images), path)
    content = path.read_bytes()
    for place in [*range(0, 60, 3), *range(60, len(content), len(content) // 60), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        check_refused(path, net, "damaged|not one of fxquant|format version", untouched)


def test_longer_than_written(net, images, path, untouched):
    fxquant.save(quantize(net, images), path)
    path.write_bytes(path.read_bytes() + b"more")
    check_refused(path, net, "is damaged, truncated, or no safetensors file", untouched)


def test_foreign_files(net, tmp_path, path, untouched):
    safetensors.torch.save_file(net.state_dict(), path)
    check_refused(path, net, "is a safetensors file, but not one of fxquant. Load a file that fxquant.save wrote", untouched)
    torch.save(net.state_dict(), path)
    check_refused(path, net, "no safetensors file", untouched)
    path.write_text("fxquant")
    check_refused(path, net, "no safetensors file", untouched)
    check_refused(tmp_path / "missing.safetensors", net, r"is no file\. Check the path", untouched)
    check_refused(tmp_path, net, r"is no file\. Check the path", untouched)


def test_newer_version(net, images, path, untouched):
    fxquant.save(quantize(net, images), path)
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["fxquant"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for version in (2, 99, "x", None):
        safetensors.torch.save_file(tensors, path, {"fxquant": json.dumps({**header, "version": version})})
        check_refused(path, net, f"has format version {version!r}, this fxquant reads 1. Upgrade fxquant", untouched)
    for damaged in ({}, [], {"version": 1}, {**header, "checksum": ""}):
        safetensors.torch.save_file(tensors, path, {"fxquant": json.dumps(damaged)})
        check_refused(path, net, "is damaged: its (header cannot be read|checksum does not match)", untouched)


@pytest.mark.parametrize(
    "options", [{"depth": 2}, {"width": 16}, {"classes": 11}, {"act": nn.GELU}, {"channels": 1}], ids=lambda options: next(iter(options))
)
def test_other_architecture(net, make_net, images, path, untouched, options):
    fxquant.save(quantize(net, images, cat="paper"), path)
    check_refused(
        path,
        make_net(**options),
        "belongs to another architecture: .*Build the network as it was when .*run them again and pass that graph",
        untouched,
    )


def test_other_sizes_behind_equal_layers(images, path, untouched):
    class Scaled(nn.Module):
        def __init__(self, size: int):
            super().__init__()
            self.fc, self.scale = nn.Linear(192, 10), nn.Parameter(torch.ones(size))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) * self.scale

    fxquant.save(quantize(Scaled(10).eval(), images), path)
    check_refused(path, Scaled(1).eval(), r"scale has shape \[10\], the network wants \[1\]", untouched)


class Fixed(nn.Module):
    """Random numbers that a state_dict leaves out, read by the network itself and by an opaque module."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 10)
        self.register_buffer("mask", torch.rand(192), persistent=False)
        self.inner = Opaque()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.fc(x.flatten(1) * self.mask))


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.rand(10), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def test_buffers_that_a_state_dict_leaves_out(images, path):
    torch.manual_seed(0)
    first, second = (fxquant.trace(Fixed().eval(), images[0], leaf_modules=(Opaque,)) for _ in range(2))
    quantized = quantize(first, images)
    fxquant.save(quantized, path)
    assert torch.equal(fxquant.load(path, second)(images[0]), quantized(images[0]))


@pytest.mark.parametrize("architecture", [None, "resnet18", torch.nn.Conv2d])
def test_no_network(net, images, path, architecture):
    fxquant.save(quantize(net, images), path)
    with pytest.raises(fxquant.ModelError, match=r"is a .*, not an nn.Module. Pass the network itself"):
        fxquant.load(path, architecture)


def test_a_network_without_weights(net, images, path):
    fxquant.save(quantize(net, images), path)
    with pytest.raises(fxquant.ModelError, match=r"has no data \(meta device\)"):
        fxquant.load(path, net.to("meta"))


def test_loading_into_a_quantized_network(net, images, path):
    quantized = quantize(net, images)
    fxquant.save(quantized, path)
    with pytest.raises(fxquant.ModelError, match=r"is quantized already. Pass the float network"):
        fxquant.load(path, quantized)


# Writing


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "model"])
def test_saving_what_is_not_quantized(path, model):
    with pytest.raises(
        fxquant.ModelError, match=r"carries no record of a quantization. Pass what fxquant.quantize or fxquant.load returned"
    ):
        fxquant.save(model, path)
    assert not path.exists()


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full disk", "ctrl-c"])
def test_a_failure_while_writing_keeps_the_old_file(net, images, path, monkeypatch, broken, error):
    path.write_bytes(b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(broken, fail)
    quantized = quantize(net, images)
    with pytest.raises(fxquant.StorageError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        fxquant.save(quantized, path)
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"{path}: cannot be written: [Errno 28] No space left on device. Check the folder, its perm")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_missing_folder(net, images, tmp_path):
    with pytest.raises(fxquant.StorageError, match=r"missing/model.safetensors: cannot be written: .*No such file or directory"):
        fxquant.save(quantize(net, images), tmp_path / "missing" / "model.safetensors")


def test_a_folder_of_that_name(net, images, tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(fxquant.StorageError, match="cannot be written"):
        fxquant.save(quantize(net, images), tmp_path / "model.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(net, images, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(fxquant.StorageError, match=r"cannot be written: .*Permission denied"):
            fxquant.save(quantize(net, images), tmp_path / "model.safetensors")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_others_may_read_the_file(net, images, path):
    fxquant.save(quantize(net, images), path)
    plain = path.with_name("plain")
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


def test_path_as_a_string(net, images, path):
    quantized = quantize(net, images)
    fxquant.save(quantized, str(path))
    assert torch.equal(fxquant.load(str(path), net)(images[0]), quantized(images[0]))


def test_codes_use_all_levels(net, images, path):
    """A file of packed zeros would be small too."""
    fxquant.save(quantize(net, images), path)
    loaded = fxquant.load(path, net)
    codes = [module.codes() for module in loaded.modules() if isinstance(module, QuantizedLayer)]
    assert all(code.unique().numel() == 4 for code in codes[1:3])
