"""Load a checkpoint of Hugging Face transformers, or say in one sentence why that cannot be."""

import importlib.util
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from visionkernels.errors import UserError

# Image processors that need torchvision, and the one that does the same on Pillow. DINOv3's resizes in float32, this
# one in 8 bits: pixels differ by a rounding.
_ON_PILLOW = {"DINOv3ViTImageProcessor": "ViTImageProcessor"}


def require(*packages: str, job: str = "detect") -> None:
    """Raise a UserError that says what to install for a job, unless these packages (by import name) are there."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join({"PIL": "pillow"}.get(name, name) for name in missing)
        raise UserError(f"{job} needs {names}, not installed here: pip install 'visionkernels[hf]'")


def load_checkpoint(model: str | Path) -> tuple[Any, Any]:
    """Load the image processor and the model of a detection checkpoint.

    Args:
        model: A directory or hub id.

    Returns:
        The image processor, and the model in float32 on the CPU.

    Raises:
        UserError: If there is no checkpoint, it is incomplete, or it is no detector.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForObjectDetection
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING

    config = read_config(model)
    if type(config) not in MODEL_FOR_OBJECT_DETECTION_MAPPING:
        raise UserError(
            f"model: {model} holds a {config.model_type} model, which is no object detector for images alone"
        )
    try:
        processor = load_processor(model)
        loaded, info = AutoModelForObjectDetection.from_pretrained(
            model,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported just below, and not ignored
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"model: {model} cannot be loaded: {one_line(error)}") from error
    if info["mismatched_keys"]:
        name = min(key[0] for key in info["mismatched_keys"])
        raise UserError(f"model: the weights in {model} do not fit its config.json, such as {name}")
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in loaded.named_parameters()})
    if missing:
        # transformers would fill them with random numbers and find nothing.
        raise UserError(
            f"model: {model} is no complete {type(loaded).__name__}: "
            f"{len(missing)} weights are missing, such as {missing[0]}"
        )
    return processor, loaded


def load_processor(model: str | Path) -> Any:
    """Load the image processor, the one that works on Pillow where there are two.

    transformers' `AutoImageProcessor` prefers the one that needs torchvision; 5.17 knows no other.
    """
    import transformers
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    settings = get_image_processor_config(model)
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    kind = _ON_PILLOW.get(kind, kind)
    cls = getattr(transformers, f"{kind}Pil", None) or transformers.AutoImageProcessor
    return cls.from_pretrained(model)


def read_config(model: str | Path) -> Any:
    """Read the configuration of a checkpoint.

    Args:
        model: A directory or hub id.

    Raises:
        UserError: If there is none, or transformers does not know it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = Path(model)
    if path.is_file():
        raise UserError(f"model: {model} is a file; name the checkpoint's directory")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model: {model} is no checkpoint: there is no config.json in it")
    elif path.is_absolute() or str(model).startswith((".", "~")) or len(path.parts) > 2:
        raise UserError(f"model: there is no directory {model}")  # it cannot be a hub id
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        kind = "is no checkpoint" if path.is_dir() else "is neither a directory nor a model that the hub gave out"
        raise UserError(f"model: {model} {kind}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the error's message without line breaks, at most 300 characters of it."""
    return " ".join(str(error).split())[:300] or type(error).__name__
