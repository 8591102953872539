"""The files of a checkpoint: a directory, or what the Hugging Face hub has under an id."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visionkernels._checkpoint import one_line
from visionkernels.errors import UserError
from visionkernels.models.kinds import FILES, OBJECT, PREPROCESSOR, check, check_value

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose weights are not read yet.

    Attributes:
        name: What the caller named.
        config: The parsed config.json.
        preprocessor: The settings of the image processor, of preprocessor_config.json or of processor_config.json; or
            None.
        files: The safetensors file of every tensor.
    """

    name: str
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any] | None
    files: Mapping[str, Path]


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Find the files of a checkpoint.

    Args:
        model: A directory, or an id on the hub, whose files are downloaded unless they are in its cache.

    Raises:
        UserError: If it is neither, or lacks a file.
    """
    if importlib.util.find_spec("safetensors") is None:
        raise UserError("model: reading a checkpoint needs safetensors: pip install 'visionkernels[hf]'")
    find = _finder(model)
    return Checkpoint(str(model), _config(find, model), _preprocessor(find, model), _tensor_files(find, model))


def read_settings(model: str | Path) -> Mapping[str, Any]:
    """The parsed config.json of a checkpoint.

    Args:
        model: A directory, or an id on the hub.

    Raises:
        UserError: If it is neither, or has no config.json that can be read.
    """
    return _config(_finder(model), model)


def _config(find: Callable[[str], Path | None], model: str | Path) -> Mapping[str, Any]:
    config = find("config.json")
    if config is None:
        raise UserError(f"model: {model} is no checkpoint: there is no config.json in it")
    return _read_json(config, model)


def _preprocessor(find: Callable[[str], Path | None], model: str | Path) -> Mapping[str, Any] | None:
    path = find("preprocessor_config.json")
    if path is not None:
        settings = _read_json(path, model)
    else:
        path = find("processor_config.json")  # of pictures and text together
        if path is None:
            return None
        found = _read_json(path, model)
        check(path.name, found, {"image_processor": OBJECT})
        settings = found.get("image_processor") or {}
    check(path.name, settings, PREPROCESSOR, required=("rescale_factor",) if settings.get("do_rescale", True) else ())
    return settings


def _finder(model: str | Path) -> Callable[[str], Path | None]:
    """A function that returns the path of one of the checkpoint's files, or None if it has no such file."""
    path = Path(model)
    if path.is_file():
        raise UserError(f"model: {model} is a file; name the checkpoint's directory")
    if path.is_dir():
        return lambda name: path / name if (path / name).is_file() else None
    if path.is_absolute() or str(model).startswith((".", "~")) or len(path.parts) != 2:
        raise UserError(f"model: there is no directory {model}")  # it cannot be a hub id
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(
            f"model: there is no directory {model}, and the hub needs huggingface_hub: pip install 'visionkernels[hf]'"
        )
    return lambda name: _download(str(model), name)


def _download(model: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except LocalEntryNotFoundError as error:  # the hub was not reached; also an EntryNotFoundError
        if name == "config.json":
            raise UserError(f"model: {model} is no directory, and the hub cannot be reached") from error
        return None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = one_line(error)
        raise UserError(f"model: {model} is neither a directory nor a model that the hub gave out: {reason}") from error


def _read_json(path: Path, model: str | Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # also of bytes that are no text, and of endless numbers
        raise UserError(f"model: {path.name} in {model} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"model: {path.name} in {model} must hold an object, but it holds a {type(found).__name__}")
    return found


def _tensor_files(find: Callable[[str], Path | None], model: str | Path) -> dict[str, Path]:
    from safetensors import safe_open

    index = find(INDEX)
    if index is None:
        single = find(WEIGHTS)
        if single is None:
            raise UserError(f"model: {model} has no weights in it: neither {WEIGHTS} nor {INDEX}")
        with reading(model, single), safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    found = _read_json(index, model)
    check_value(f"model: {INDEX}: weight_map", found.get("weight_map"), FILES)
    shards: Mapping[str, str] = found["weight_map"]
    paths = {name: find(name) for name in sorted(set(shards.values()))}
    absent = [name for name, path in paths.items() if path is None]
    if absent:
        raise UserError(f"model: {model} lacks {absent[0]}, which {INDEX} names")
    return {name: path for name, shard in shards.items() if (path := paths[shard]) is not None}


@contextmanager
def reading(model: str | Path, path: Path) -> Iterator[None]:
    """A context in which a file of safetensors is read: what is wrong with it becomes a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"model: {path.name} in {model} cannot be read: {one_line(error)}") from error


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of a checkpoint's weights: what its config.json names, else that of its first floating tensor."""
    from safetensors import safe_open

    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = getattr(torch, str(named).removeprefix("torch."), None) if named else None
    if dtype in DTYPES:
        return dtype
    for name, path in checkpoint.files.items():
        with reading(checkpoint.name, path), safe_open(path, "pt") as file:
            found = _SAFETENSORS_DTYPES.get(file.get_slice(name).get_dtype())
        if found is not None:
            return found
    return torch.float32


def check_support(dtype: torch.dtype, device: torch.device) -> None:
    """Raise a UserError if the device does not compute in the dtype."""
    if dtype != torch.bfloat16 or device.type != "cuda" or torch.version.hip is not None:
        return
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"dtype: {name} ({device}) has no bfloat16; use torch.float16 or torch.float32")


def normalisation(
    preprocessor: Mapping[str, Any] | None,
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and deviation by channel that an image processor's settings name, or None."""
    if preprocessor is None or not preprocessor.get("do_rescale", True):
        return None, None
    if abs(preprocessor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        return None, None
    if not preprocessor.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if mean is None or std is None:
        return None, None
    return _by_channel(mean), _by_channel(std)


def _by_channel(numbers: float | Sequence[float]) -> tuple[float, ...]:
    """Three numbers, or one that holds for every channel."""
    return tuple(map(float, numbers)) if isinstance(numbers, Sequence) else (float(numbers),) * 3
