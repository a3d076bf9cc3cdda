"""Networks of torchvision and timm by name: built without a download, filled from a file, with their own preprocessing.

build("resnet18")          torchvision, which is asked first; "timm:resnet18" or library="timm" ask timm
load_weights(model, file)  .safetensors, or .pth read without unpickling anything but tensors
preprocessing(network)     from a PIL image to the tensor that the network was trained on
"""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import timm.data
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from fxquant.errors import ConfigError, StorageError, listed

LIBRARIES = ("torchvision", "timm")
_NESTED = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Network:
    """A float network in eval mode and where it comes from."""

    name: str
    library: str
    model: nn.Module


def build(name: str, library: str | None = None, num_classes: int | None = None) -> Network:
    """Return the network called `name` with random weights, in eval mode.

    Args:
        name: a classification network of torchvision or timm; ``"torchvision:"`` or ``"timm:"`` in front chooses the library.
        library: the same choice; None: torchvision if it knows the name, else timm.
        num_classes: of the classifier; None: as published.

    Raises:
        ConfigError: a name or a library that does not exist; the nearest names are suggested.
    """
    prefix, _, rest = name.rpartition(":")
    if prefix in LIBRARIES:
        if library not in (None, prefix):
            raise ConfigError(f"{name!r} is of {prefix}, but the library is {library!r}", where="model", fix="Give one of the two")
        name, library = rest, prefix
    if library not in (None, *LIBRARIES):
        raise ConfigError(f"{library!r} is not known", where="library", fix=f"Use one of {listed(LIBRARIES)}")
    classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if library != "timm" and name in _torchvision_names():
        slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **classes, **slow)
        return Network(name, "torchvision", model.eval())
    if library != "torchvision" and timm.is_model(name):
        return Network(name, "timm", timm.create_model(name, pretrained=False, **classes).eval())
    raise ConfigError(f"{name!r} is no network of {library or 'torchvision or timm'}", where="model", fix=_suggest(name, library))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill `model` from a .safetensors file, or from a .pth file that holds tensors only; all of it, or nothing.

    A state_dict inside of a checkpoint is found under ``"state_dict"``, ``"model_state_dict"`` or ``"model"``; the prefixes of
    DataParallel and torch.compile are taken off.

    Raises:
        StorageError: the file is missing, damaged, holds pickled objects, or does not fit the network: which names or shapes differ.
    """
    path = Path(path)
    state = _unwrapped(_read(path), path)
    wanted = model.state_dict()
    missing, unexpected = ([key for key in a if key not in b and not _is_counter(key)] for a, b in ((wanted, state), (state, wanted)))
    if missing or unexpected:
        parts = [f"{word} {_some(keys)}" for word, keys in (("without", missing), ("with unknown", unexpected)) if keys]
        raise StorageError(
            f"does not fit {type(model).__name__}: {' and '.join(parts)}", where=str(path), fix="Check --model and --library"
        )
    for key, value in wanted.items():
        if key in state and state[key].shape != value.shape:
            shapes = f"{list(state[key].shape)} in the file, {list(value.shape)} in the network"
            same_inside = state[key].shape[1:] == value.shape[1:]
            fix = f"Try --num-classes {state[key].shape[0]}" if same_inside else "Check --model and --library"
            raise StorageError(f"does not fit {type(model).__name__}: {key} is {shapes}", where=str(path), fix=fix)
    model.load_state_dict(state, strict=False)


def preprocessing(network: Network) -> Callable[[Any], Tensor]:
    """Return the evaluation transform of the published weights: PIL image to normalized ``[3, H, W]``. Nothing is downloaded."""
    if network.library == "torchvision":
        return torchvision.models.get_model_weights(network.name).DEFAULT.transforms()
    config = timm.data.resolve_model_data_config(network.model)
    return timm.data.create_transform(**config, is_training=False)


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _suggest(name: str, library: str | None) -> str:
    known = {"torchvision": _torchvision_names(), "timm": timm.list_models()}
    names = {candidate for key, candidates in known.items() if library in (None, key) for candidate in candidates}
    near = difflib.get_close_matches(name.lower(), sorted(names), n=3)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return "Names are those of torchvision.models.list_models() and timm.list_models()"


def _read(path: Path) -> Any:
    if not path.is_file():
        raise StorageError("is no file", where=str(path), fix="Check the path of the weights")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise StorageError(
            "holds pickled Python objects, or is damaged; fxquant unpickles nothing but tensors",
            where=str(path),
            fix="Where you trust the file, write model.state_dict() to a new one with torch.save",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise StorageError(f"is damaged, or no weights file ({error})", where=str(path), fix="Copy it again, or save it anew") from error


def _unwrapped(state: Any, path: Path) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    if not tensors or not state:
        raise StorageError("holds no state_dict", where=str(path), fix=f"Save model.state_dict(), plain or under {listed(_NESTED)}")
    state = dict(state)
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_counter(key: str) -> bool:
    """Checkpoints of old do not count batches, and nothing reads the count."""
    return key.endswith("num_batches_tracked")


def _some(keys: list[str]) -> str:
    return f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
