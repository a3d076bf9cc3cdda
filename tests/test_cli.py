"""The command line: a round trip on a tiny network, and one readable message for everything that can be mistyped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

import fxquant
from fxquant import cli, cli_words, folder, networks
from fxquant.errors import CalibrationError, ConfigError, StorageError
from fxquant.recipe import PRESETS
from fxquant.reconstruction.keeper import Keeper

NAME = "test_resnet"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with float weights, a quantized network, and photos of three classes (four, three and one image)."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=False, num_classes=3)
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.3)
    safetensors.torch.save_file(model.state_dict(), root / "float.safetensors")
    for name, count in (("cat", 4), ("dog", 3), ("eel", 1)):
        (root / "photos" / name).mkdir(parents=True)
        for index in range(count):
            image = Image.effect_noise((180, 170), 20 + 30 * index).convert("RGB")
            image.save(root / "photos" / name / f"{index}.png")
    assert run("quantize", root, "--out", str(root / "q.safetensors"), "--quiet", "--w", "2", "--a", "4", "--images", "6") == 0
    return root


def run(command: str, root: Path, *words: str) -> int:
    """Run a command on the tiny network and its photos."""
    given = [command, "--model", NAME, "--num-classes", "3"]
    if command == "quantize":
        given += ["--weights", str(root / "float.safetensors"), "--edges", "same", "--recipe", "fast"]
    if command != "report":
        given += ["--data", str(root / "photos")]
    return cli.main([*given, *words])


def message(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """Return what was printed to stderr behind a command that failed, on one line."""
    captured = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def test_a_quantized_file_is_evaluated_against_its_float_network(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", place, str(place / "q.safetensors"), "--float-weights", str(place / "float.safetensors"), "--quiet") == 0
    out = capsys.readouterr().out
    assert "8 images" in out
    assert re.search(r"quantized\s+│\s+\d+\.\d\d\s+│\s+\d+\.\d\d\s+│\s+\d\.\d{4}", out)
    assert re.search(r"float\s+│\s+\d+\.\d\d", out)


def test_evaluate_gives_what_the_library_gives(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = networks.build(NAME, num_classes=3)
    qmodel = fxquant.load(place / "q.safetensors", network.model)
    photos = folder.ImageFolder(place / "photos", networks.preprocessing(network))
    images, labels = next(iter(photos.loader(8)))
    with torch.inference_mode():
        expected = 100 * (qmodel(images).argmax(1) == labels).double().mean().item()
    run("evaluate", place, str(place / "q.safetensors"), "--quiet", "--batch-size", "8")
    assert f"{expected:.2f}" in capsys.readouterr().out


def test_other_classes_than_folders_give_no_top1(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = place / "photos" / "cat"
    assert run("evaluate", place, str(place / "q.safetensors"), "--data", str(flat), "--quiet") == 0
    assert "no top-1: 0 class folders, 3 classes" in " ".join(capsys.readouterr().out.split())


def test_report_shows_every_layer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", place, str(place / "q.safetensors")) == 0
    out = capsys.readouterr().out
    assert "fold_batch_norm" in out
    assert "6 calibration images" in out


def test_unknown_model_suggests_the_nearest(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["evaluate", "q", "--model", "resnet81", "--data", str(place)])
    text = message(capsys, code)
    assert "'resnet81' is no network of torchvision or timm" in text
    assert "Did you mean resnet18" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--weights", "nowhere.pth"], "nowhere.pth: is no file"),
        (["--num-classes", "5"], "Try --num-classes 3"),
        (["--model", "resnet18"], "does not fit ResNet: without conv1.weight"),
        (["--data", "nowhere"], "nowhere: is no folder"),
        (["--override", "layer4:4"], "'layer4:4' is no override. Write GLOB:w=BITS,a=BITS"),
        (["--override", "layer4.*:b=4"], "is no override"),
        (["--override", "lyer4.*:w=4"], "overrides['lyer4.*']: matches no layer. Did you mean 'layer4.*'?"),
        (["--w", "9"], "9 bits are not supported"),
        (["--recipe", "fats"], "did you mean 'fast'?"),
        (["--recipe", "nowhere.toml"], "nowhere.toml: is no file"),
        (["--out", "nowhere/q.safetensors"], "its folder does not exist"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "one", "--checkpoint", "other"], "'other' and 'one' are two folders"),
    ],
)
def test_bad_input_is_one_message(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    code = run("quantize", place, "--out", str(place / "unwritten.safetensors"), "--quiet", "--images", "2", *words)
    assert expected in message(capsys, code)
    assert not (place / "unwritten.safetensors").exists()


def test_debug_raises(place: Path) -> None:
    with pytest.raises(ConfigError, match="is no override"):
        run("quantize", place, "--out", "q", "--override", "fc", "--debug")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in ((["--help"], "fxquant demo"), (["quantize", "--help"], "--override"), (["--version"], fxquant.__version__)):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(("command", "default"), [("quantize", "standard"), ("demo", "fast")])
def test_help_names_every_recipe(command: str, default: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(PRESETS)}, or a TOML file (default: {default};" in text
    given = [] if command == "demo" else ["--model", "m", "--weights", "w", "--data", "d", "--out", "o"]
    assert cli.parser().parse_args([command, *given]).recipe == default


@pytest.fixture
def learning(tmp_path: Path) -> str:
    """A recipe file that learns, but not for long."""
    brief = {"unit_iterations": 2, "unit_batch": 2, "finish_iterations": 2, "finish_batch": 2, "finish_checks": 2}
    fxquant.Recipe(name="brief", stages=("ranges", "units", "finish"), **brief).save(tmp_path / "brief.toml")
    return str(tmp_path / "brief.toml")


@pytest.mark.parametrize("stage", ["units", "finish"])
def test_a_run_that_was_stopped_goes_on(place: Path, tmp_path: Path, learning: str, stage: str, capsys, monkeypatch) -> None:
    def words(out: str, *more: str) -> tuple[str, ...]:
        return "--out", str(tmp_path / out), "--recipe", learning, "--images", "6", "--quiet", *more

    whole = Keeper.save

    def stopped(self: Keeper, at: str, done: int, *rest: Any) -> None:
        whole(self, at, done, *rest)
        if (at, done) == (stage, 1):
            raise KeyboardInterrupt

    assert run("quantize", place, *words("whole.safetensors")) == 0
    monkeypatch.setattr(Keeper, "save", stopped)
    folder = tmp_path / "run"
    capsys.readouterr()
    assert run("quantize", place, *words("part.safetensors", "--checkpoint", str(folder))) == 130
    assert capsys.readouterr().err == f"stopped; --resume {folder} goes on from here\n"
    assert [path.name for path in folder.iterdir()] == ["checkpoint.safetensors"]
    assert not (tmp_path / "part.safetensors").exists()
    monkeypatch.undo()
    capsys.readouterr()
    other = run("quantize", place, *words("part.safetensors", "--resume", str(folder), "--w", "3"))
    assert str(folder) in message(capsys, other)
    assert run("quantize", place, *words("part.safetensors", "--resume", str(folder))) == 0
    assert (tmp_path / "part.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not folder.exists()


def test_a_run_that_was_stopped_before_it_learned(place: Path, tmp_path: Path, learning: str, capsys, monkeypatch) -> None:
    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fxquant, "quantize", stopped)
    words = ("--out", str(tmp_path / "q.safetensors"), "--recipe", learning, "--checkpoint", str(tmp_path / "run"), "--quiet")
    assert run("quantize", place, *words) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_cat_settings() -> None:
    given = ["quantize", "--model", "m", "--weights", "w", "--data", "d", "--out", "o"]
    settings = [cli.parser().parse_args([*given, *words]).cat for words in ([], ["--cat"], ["--cat", "paper"], ["--no-cat"])]
    assert settings == [True, True, "paper", False]
    assert cli.parser().parse_args([*given, "--w", "float"]).w is None


def test_overrides_keep_their_order() -> None:
    assert cli_words.read_overrides(["layer4.*:w=4,a=8", "fc:a=float"]) == {"layer4.*": {"w": 4, "a": 8}, "fc": {"a": None}}


def test_libraries() -> None:
    assert networks.build("resnet18", num_classes=2).library == "torchvision"
    assert networks.build(f"timm:{NAME}").library == "timm"
    with pytest.raises(ConfigError, match="is no network of torchvision"):
        networks.build(NAME, "torchvision")
    with pytest.raises(ConfigError, match="Give one of the two"):
        networks.build(f"timm:{NAME}", "torchvision")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_checkpoints_are_unwrapped(tmp_path: Path, wrap) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    networks.load_weights(target, tmp_path / "w.pth")
    assert torch.equal(source.weight, target.weight)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2), tmp_path / "model.pth")
    with pytest.raises(StorageError, match="unpickles nothing but tensors"):
        networks.load_weights(nn.Linear(3, 2), tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 no weights")
    with pytest.raises(StorageError, match="damaged"):
        networks.load_weights(nn.Linear(3, 2), tmp_path / name)


def test_a_file_without_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(StorageError, match="holds no state_dict"):
        networks.load_weights(nn.Linear(3, 2), tmp_path / "w.pth")


def test_images_are_chosen_evenly_and_always_the_same(place: Path) -> None:
    def chosen(seed: int) -> list[tuple[str, int]]:
        return [(path.name, label) for path, label in folder.ImageFolder(place / "photos", lambda x: x, 5, seed).items]

    assert chosen(0) == chosen(0)
    assert len({tuple(chosen(seed)) for seed in range(5)}) > 1
    assert sorted(label for _, label in chosen(0)) == [0, 0, 1, 1, 2]


def test_folders_without_images_or_with_broken_ones(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no images"):
        folder.ImageFolder(tmp_path, lambda x: x)
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match=r"broken\.jpg: is no readable image"):
        folder.ImageFolder(tmp_path, lambda x: x)[0]
