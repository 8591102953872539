"""What the values of a checkpoint's JSON files, and a few arguments, may be: a kind for each key."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from numbers import Integral
from typing import Any, NamedTuple

from visionkernels.errors import UserError
from visionkernels.ops._common import shown


class Kind(NamedTuple):
    """A kind of value: in words, as "expected ..." goes on, and whether a value is of it."""

    words: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    """A whole number; `True` is none."""
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    """A number; NaN is in no range."""
    return Kind(
        f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high
    )


def one_or_three(kind: Kind) -> Kind:
    """One of a kind, or three: one a channel."""
    return _one_or(kind, 3, "a list of three")


def one_or_two(kind: Kind) -> Kind:
    """One of a kind, or two: height and width."""
    return _one_or(kind, 2, "[height, width]")


def _one_or(kind: Kind, count: int, several: str) -> Kind:
    return Kind(
        f"{kind.words}, or {several} of such",
        lambda value: kind.fits(value) or (_is_list(value) and len(value) == count and all(map(kind.fits, value))),
    )


def one_of(*choices: str) -> Kind:
    """One of a few words."""
    return Kind(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_labels(value: Any) -> bool:
    """Names by number; in JSON the numbers are strings."""
    return isinstance(value, Mapping) and all(type(key) is int or str(key).isdecimal() for key in value)


# Far beyond every model there is, and no product of them overflows.
SIZE = whole(1, 2**16)
COUNT = whole(0, 2**16)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
TEXTS = Kind("a list of strings", lambda value: _is_list(value) and all(isinstance(text, str) for text in value))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
LABELS = Kind("an object of names by their numbers", _is_labels)
FILES = Kind(
    "an object of file names",
    lambda value: OBJECT.fits(value) and all(isinstance(name, str) for name in value.values()),
)

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
CONFIG = {  # of what a config.json says about the whole model
    "model_type": TEXT,
    "architectures": TEXTS,
    "vision_config": OBJECT,
    "id2label": LABELS,
    "num_labels": COUNT,
    "problem_type": one_of(*PROBLEM_TYPES),
    "projection_dim": SIZE,
}
VISION_CONFIG = {  # and about its vision half
    "hidden_size": SIZE,
    "num_hidden_layers": whole(1, 1000),
    "num_attention_heads": SIZE,
    "head_dim": SIZE,
    "intermediate_size": SIZE,
    "mlp_ratio": number(1e-3, 1e3),
    "hidden_act": TEXT,
    "layer_norm_eps": number(0, 1),
    "image_size": one_or_two(SIZE),
    "patch_size": one_or_two(SIZE),
    "num_channels": SIZE,
    "num_register_tokens": COUNT,
    "pooler_output_size": SIZE,
    "projection_dim": SIZE,
    "rope_theta": number(1e-3, 1e12),
    "layer_scale_init_value": number(-1e6, 1e6),
    **dict.fromkeys(("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"), FLAG),
    **dict.fromkeys(("use_gated_mlp", "use_swiglu_ffn", "vision_use_head", "use_mean_pooling"), FLAG),
    **dict.fromkeys(("use_absolute_position_embeddings", "use_relative_position_bias"), FLAG),
    "use_shared_relative_position_bias": FLAG,
}
PREPROCESSOR = {  # of what a preprocessor_config.json says that is read here
    "image_processor_type": TEXT,
    "feature_extractor_type": TEXT,
    "do_rescale": FLAG,
    "rescale_factor": number(0, 1e6),
    "do_normalize": FLAG,
    "image_mean": one_or_three(number(-1e6, 1e6)),
    "image_std": one_or_three(number(1e-6, 1e6)),
}


def plain(value: Any) -> Any:
    """An argument with Python's integers in place of NumPy's, which the operators do not take."""
    if isinstance(value, (list, tuple)):
        parts = [plain(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return int(value) if not isinstance(value, bool) and isinstance(value, Integral) else value


def check(file: str, values: Mapping[str, Any], kinds: Mapping[str, Kind], required: Collection[str] = ()) -> None:
    """Raise a UserError that names the first key whose value is not of its kind.

    Args:
        file: What the values are from.
        values: The parsed file; keys without a kind may be anything.
        kinds: By key.
        required: Keys that may be left out but not be null, which the others may.
    """
    for key, kind in kinds.items():
        if key in values and not (values[key] is None and key not in required):
            check_value(f"model: {file}: {key}", values[key], kind)


def check_value(name: str, value: Any, kind: Kind) -> None:
    """Raise a UserError unless a value is of a kind."""
    if not kind.fits(value):
        raise UserError(f"{name}: expected {kind.words}, but it is {shown(value)}")
