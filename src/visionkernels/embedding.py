"""Turn pictures into vectors, or into labels, with a vision transformer on this package's operators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visionkernels._checkpoint import load_processor, one_line, require
from visionkernels._devices import find_device
from visionkernels._images import read_image
from visionkernels.errors import UserError
from visionkernels.models import ViT, ViTOutput
from visionkernels.models.pixels import fits

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

BATCH_SIZE = 32


def embed(
    image: Any,
    model: str | Path | ViT,
    *,
    normalize: bool = False,
    batch_size: int = BATCH_SIZE,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> np.ndarray:
    """Turn an image into a vector.

    The vector is what the checkpoint was trained to give for a picture: CLIP's projected `image_embeds`, else the
    `pooler_output`, else the class token of the last hidden state.

    Args:
        image: A path, a PIL image, or a NumPy array or torch tensor `[height, width, 3]` of uint8 RGB, as for
            `visionkernels.detect`; or a list of them.
        model: A directory or hub id of a checkpoint that `visionkernels.ViT.from_pretrained` reads, or a `ViT`
            from there to use again, which spares the loading.
        normalize: Divide each vector by its length.
        batch_size: How many pictures of a list run at once.
        device: `"cpu"`, `"cuda"` or `"cuda:<index>"`; by default a GPU if there is one.
        dtype: Of the weights; by default as the checkpoint has them.

    Returns:
        A NumPy array of float32: `[C]`, or `[n, C]` for a list of n. Its numbers are finite.

    Raises:
        UserError: In one sentence, if an argument cannot be used, or the model gives NaN or infinity, as one does
            whose numbers float16 cannot hold.

    Example:
        >>> import visionkernels as vk
        >>> vk.embed("cat.jpg", "facebook/dinov2-base").shape  # doctest: +SKIP
        (768,)
    """
    pictures, vit = _prepare(image, model, device, dtype)
    vectors = torch.cat(list(embeddings(vit, pictures, batch_size, normalize=normalize))).numpy()
    return vectors if _is_many(image) else vectors[0]


def classify(
    image: Any,
    model: str | Path | ViT,
    *,
    top_k: int = 5,
    batch_size: int = BATCH_SIZE,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> list[Any]:
    """Say what an image shows, by the classes of a checkpoint.

    Args:
        image: As for `embed`.
        model: As for `embed`; a checkpoint with a classifier.
        top_k: How many labels, at most; at least 1.
        batch_size: As for `embed`.
        device: As for `embed`.
        dtype: As for `embed`.

    Returns:
        `[{"label", "score"}]`, the highest score first; a list of such lists for a list of images. Scores are what
        transformers' image-classification pipeline makes of the logits: by the config.json's `problem_type` their
        sigmoid for `"multi_label_classification"`, so that each is a probability of its own, and themselves for
        `"regression"`; else their softmax, and of a single one the sigmoid.

    Raises:
        UserError: In one sentence, if an argument cannot be used, the checkpoint does not classify, or the model gives
            NaN or infinity, as for `embed`.

    Example:
        >>> import visionkernels as vk
        >>> vk.classify("cat.jpg", "google/vit-base-patch16-224", top_k=1)  # doctest: +SKIP
        [{'label': 'tabby, tabby cat', 'score': 0.71}]
    """
    check_positive("top_k", top_k)
    pictures, vit = _prepare(image, model, device, dtype)
    found = [labels for batch in classifications(vit, pictures, batch_size, top_k=top_k) for labels in batch]
    return found if _is_many(image) else found[0]


def load_model(
    model: str | Path | ViT, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> ViT:
    """The model, on the GPU if there is one and nothing else is asked for.

    Raises:
        UserError: If it cannot be loaded, or is a `ViT` and elsewhere or in another dtype than asked for.
    """
    if not isinstance(model, ViT):
        return ViT.from_pretrained(model, device=find_device(device), dtype=dtype)
    if model.name is None:
        raise UserError("model: the ViT is not from a checkpoint, so how pictures are prepared for it is not known")
    if device is not None and find_device(device) != model.device:
        raise UserError(f"device: {device} was asked for, but the given ViT is on {model.device}; leave it out")
    if dtype is not None and dtype != model.dtype:
        raise UserError(f"dtype: {dtype} was asked for, but the given ViT is in {model.dtype}; leave it out")
    return model


def embeddings(
    vit: ViT, images: Iterable[Any], batch_size: int = BATCH_SIZE, *, normalize: bool = False
) -> Iterator[Tensor]:
    """The vectors of many images, batch by batch: `[batch, C]` of float32 on the CPU. Images are read as they come."""
    for output in _outputs(vit, images, batch_size):
        vectors = output.image_embeds if output.image_embeds is not None else output.pooler_output
        if vectors is None:
            tokens = output.last_hidden_state
            vectors = tokens[:, 0] if vit.config.num_class_tokens else tokens.mean(1)
        vectors = _finite(vit, vectors)
        yield torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors


def classifications(
    vit: ViT, images: Iterable[Any], batch_size: int = BATCH_SIZE, *, top_k: int = 5
) -> Iterator[list[list[dict[str, Any]]]]:
    """The labels of many images, batch by batch, as `classify` returns them."""
    check_classifier(vit)
    names = vit.config.labels
    for output in _outputs(vit, images, batch_size):
        assert output.logits is not None
        scores = _scores(_finite(vit, output.logits), vit.config.problem_type)
        best = scores.topk(min(top_k, len(names)), 1)
        yield [
            [{"label": names[i], "score": score} for score, i in zip(*rows, strict=True)]
            for rows in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def _scores(logits: Tensor, problem_type: str | None) -> Tensor:
    """By the rule of transformers' image-classification pipeline."""
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification" or logits.shape[1] == 1:
        return logits.sigmoid()
    return logits.softmax(1)


def _finite(vit: ViT, numbers: Tensor) -> Tensor:
    """The numbers in float32 on the CPU; a UserError if one is none."""
    numbers = numbers.float().cpu()
    if not numbers.isfinite().all():
        way = "its weights may be damaged" if vit.dtype == torch.float32 else "try float32 (--dtype fp32)"
        raise UserError(f"model: {vit.name} gives NaN or infinity in {vit.dtype} on {vit.device}; {way}")
    return numbers


def check_classifier(vit: ViT) -> None:
    """Raise a UserError unless the model classifies."""
    if vit.heads.classifier is None:
        raise UserError(f"model: {vit.name} is no classifier: it has vectors (see embed), and no labels")


def check_positive(name: str, number: int) -> None:
    """Raise a UserError unless `number` is a whole number of at least 1."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"{name}: expected a whole number of at least 1, but it is {number!r}")


def _is_many(image: Any) -> bool:
    return isinstance(image, (list, tuple))


def _prepare(
    image: Any, model: str | Path | ViT, device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[Sequence[Any], ViT]:
    require("transformers", "PIL", job="reading pictures")
    images = image if _is_many(image) else [image]
    if not images:
        raise UserError("image: expected at least one image, but the list is empty")
    images = [read_image(images[0]), *images[1:]]  # a wrong path should not wait for a model to load
    return images, load_model(model, device, dtype)


def _outputs(vit: ViT, images: Iterable[Any], batch_size: int) -> Iterator[ViTOutput]:
    check_positive("batch_size", batch_size)
    processor = _processor(vit)
    options = _sizes(processor, vit.image_size)
    remaining = iter(images)
    while batch := list(islice(remaining, batch_size)):
        pixels = [_pixels(vit, processor, read_image(image), options) for image in batch]
        for group in _of_one_size(pixels):
            with torch.inference_mode():
                yield vit(torch.stack(group).to(vit.device))


def _pixels(vit: ViT, processor: Any, picture: Image.Image, options: dict[str, Any]) -> Tensor:
    """What the processor makes of a picture, `[3, H, W]` of floating numbers."""
    try:
        pixels: Tensor = processor(images=picture, return_tensors="pt", **options).pixel_values[0]
    except (ValueError, TypeError) as error:  # of settings that do not fit together
        raise UserError(f"model: the image processor of {vit.name} fails: {one_line(error)}") from error
    height, width = pixels.shape[1:]
    if not fits(height, width, vit.config):
        raise UserError(
            f"model: the image processor of {vit.name} makes a picture of {height} x {width} pixels, which are no "
            f"multiples of the patch size {vit.config.patch_size}; mend the sizes in its preprocessor_config.json"
        )
    # One that neither rescales nor normalises leaves bytes, and the model is to see them as they are.
    return pixels if pixels.is_floating_point() else pixels.float()


def _of_one_size(pixels: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one size: a processor that keeps proportions makes different ones."""
    group: list[Tensor] = []
    for one in pixels:
        if group and one.shape != group[0].shape:
            yield group
            group = []
        group.append(one)
    yield group


def _processor(vit: ViT) -> Any:
    """The checkpoint's image processor, loaded once for a model."""
    found = vit.__dict__.get("_processor")
    if found is None:
        assert vit.name is not None
        try:
            found = load_processor(vit.name)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"model: the image processor of {vit.name} cannot be loaded, so how pictures are prepared for it is "
                f"not known: {one_line(error)}"
            ) from error
        vit.__dict__["_processor"] = found
    return found


def _sizes(processor: Any, size: tuple[int, int] | None) -> dict[str, Any]:
    """What to tell the processor for pictures of this size."""
    if size is None:
        return {}
    height, width = size
    both = {"height": height, "width": width}
    crop = getattr(processor, "crop_size", None)
    if not getattr(processor, "do_center_crop", False) or not crop:
        return {"size": both}
    # The picture is made a little larger than the crop, by the checkpoint's proportion.
    shortest = processor.size.get("shortest_edge") or min(processor.size["height"], processor.size["width"])
    scale = shortest / min(crop["height"], crop["width"])
    return {"size": {"shortest_edge": round(scale * max(height, width))}, "crop_size": both}
