"""Say what `visionkernels.patch` would replace in a checkpoint, without its weights."""

from pathlib import Path
from typing import Any

import torch

from visionkernels._checkpoint import one_line, read_config, require
from visionkernels.errors import UserError
from visionkernels.integrations import patch
from visionkernels.integrations._report import PatchReport


def would_patch(model: str | Path) -> PatchReport:
    """Build a checkpoint's model from its configuration, and report what `patch` replaces in it.

    The model is built on PyTorch's meta device and thrown away: no weight is read or made, nothing of a directory
    is changed, and the hub is asked only where `model` is a hub id.

    Args:
        model: a checkpoint directory of transformers, or a hub id.

    Returns:
        What `patch` would replace in the loaded model.

    Raises:
        UserError: transformers is not installed, there is no configuration, transformers cannot build its model,
            nothing in it would be replaced, or it calls the operator in a way that is not known.

    Example:
        >>> import tempfile
        >>> from transformers import RTDetrV2Config
        >>> from visionkernels.integrations.preview import would_patch
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     RTDetrV2Config(decoder_layers=1).save_pretrained(directory)
        ...     report = would_patch(directory)
        >>> report.model, [one.name for one in report.replaced]
        ('RTDetrV2Model', ['decoder.layers.0.encoder_attn'])
    """
    require("transformers", job="integrations --model")
    config = read_config(model)
    kind = _class_of(model, config)
    try:
        with torch.device("meta"):
            built = kind(config)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"model: transformers cannot build {model} from its config.json: {one_line(error)}") from error
    try:
        return patch(built)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def _class_of(model: str | Path, config: Any) -> Any:
    """Return the class that the configuration names, or the one without a head."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    names = config.architectures or []
    if names:
        kind = getattr(transformers, names[0], None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
        raise UserError(
            f"model: {model} is a {names[0]}, a class that transformers {transformers.__version__} does not have"
        )
    if type(config) not in MODEL_MAPPING:
        raise UserError(f"model: {model} names no architecture in its config.json")
    return MODEL_MAPPING[type(config)]
