"""What `visionkernels embed` and `visionkernels classify` do and show."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visionkernels import embedding
from visionkernels._checkpoint import require
from visionkernels._detect_report import silence_transformers, spinner
from visionkernels._devices import describe, find_device
from visionkernels._images import read_image
from visionkernels.errors import UserError
from visionkernels.models import ViT

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OUTPUTS = (".npy", ".parquet")


@dataclass(frozen=True)
class Request:
    """What the two jobs are asked for alike.

    Attributes:
        images: Image files.
        model: A directory or hub id.
        batch_size: How many pictures run at once.
        device: As `find_device` takes it.
        dtype: One of `DTYPES`, or None for the checkpoint's.
        quiet: Show no progress.
    """

    images: Sequence[Path]
    model: str
    batch_size: int
    device: str | None
    dtype: str | None
    quiet: bool


def embed(request: Request, output: Path | None, normalize: bool) -> dict[str, Any]:
    """Embed the images, and write the vectors to `output`.

    Returns:
        What `print_vectors` and JSON show: `model`, `device`, `dtype`, `dimensions`, `output`, and `images`, each
        with its `image` and `embedding`.

    Raises:
        UserError: If something cannot be used; whatever the arguments tell is looked at before the model is loaded.
    """
    if output is not None:
        _check_output(output)
    vit = _load(request)
    batches = embedding.embeddings(vit, request.images, request.batch_size, normalize=normalize)
    vectors = torch.cat(list(_progress(batches, request, "embedding")))
    if output is not None:
        _write(output, request.images, vectors)
    return _about(request, vit) | {
        "dimensions": vectors.shape[1],
        "output": None if output is None else str(output),
        "images": [
            {"image": str(image), "embedding": vector}
            for image, vector in zip(request.images, vectors.tolist(), strict=True)
        ],
    }


def classify(request: Request, top_k: int) -> dict[str, Any]:
    """Classify the images.

    Returns:
        What `print_labels` and JSON show: `model`, `device`, `dtype`, and `images`, each with its `image` and `labels`.

    Raises:
        UserError: As for `embed`.
    """
    embedding.check_positive("--top-k", top_k)
    vit = _load(request)
    embedding.check_classifier(vit)
    batches = embedding.classifications(vit, request.images, request.batch_size, top_k=top_k)
    labels = [found for batch in _progress(batches, request, "classifying") for found in batch]
    return _about(request, vit) | {
        "images": [{"image": str(image), "labels": found} for image, found in zip(request.images, labels, strict=True)]
    }


def print_json(report: dict[str, Any]) -> None:
    """Print the report as JSON."""
    print(json.dumps(report, indent=2, allow_nan=False))  # there is no NaN: see `embedding`


def print_vectors(report: dict[str, Any]) -> None:
    """Print the beginning of each vector, then what ran and where the vectors are."""
    from rich.table import Table
    from rich.text import Text  # of names, which may have brackets

    table = Table(title=Text(f"{len(report['images'])} x {report['dimensions']} numbers by {report['model']}"))
    table.add_column("image", overflow="fold")
    table.add_column("length", justify="right")
    table.add_column("begins with")
    for one in report["images"]:
        vector = torch.tensor(one["embedding"])
        table.add_row(
            Text(Path(one["image"]).name),
            f"{vector.norm():.3f}",
            " ".join(f"{x:.3f}" for x in vector[:5].tolist()) + " ...",
        )
    written = report["output"] and f"written to {report['output']}"
    _print(table, report, written or "not written: name a file with --output, or print all with --json")


def print_labels(report: dict[str, Any]) -> None:
    """Print the labels of each image, then what ran."""
    from rich.table import Table
    from rich.text import Text  # of names, which may have brackets

    images = f"{len(report['images'])} image{'s' * (len(report['images']) > 1)}"
    table = Table(title=Text(f"{images} by {report['model']}"))
    table.add_column("image", overflow="fold")
    table.add_column("label")
    table.add_column("score", justify="right")
    for one in report["images"]:
        for rank, found in enumerate(one["labels"]):
            name = "" if rank else Path(one["image"]).name
            table.add_row(Text(name), Text(found["label"]), f"{found['score']:.3f}")
        table.add_section()
    _print(table, report, None)


def _print(table: Any, report: dict[str, Any], last: str | None) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"ran in {report['dtype']} on {report['device']}", markup=False)
    if last:
        console.print(last, markup=False)


def _load(request: Request) -> ViT:
    require("transformers", "PIL", "rich", job="reading pictures")
    embedding.check_positive("--batch-size", request.batch_size)
    device = find_device(request.device)
    if request.dtype is not None and request.dtype not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, but it is {request.dtype!r}")
    for image in request.images:
        if not image.is_file():
            what = "is a directory; name the image files in it" if image.is_dir() else "is no file"
            raise UserError(f"image: {image} {what}")
    read_image(request.images[0])  # a wrong file should not wait for a model to load
    silence_transformers()
    with spinner("loading the model", request.quiet):
        return embedding.load_model(request.model, device, DTYPES[request.dtype] if request.dtype else None)


def _about(request: Request, vit: ViT) -> dict[str, Any]:
    dtype = str(vit.dtype).removeprefix("torch.")
    return {"model": request.model, "device": describe(vit.device), "dtype": dtype}


def _progress(batches: Iterator[Any], request: Request, what: str) -> Iterator[Any]:
    """The batches, with a bar on stderr of a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    hidden = request.quiet or not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task(what, total=len(request.images))
        for batch in batches:
            progress.advance(task, len(batch))
            yield batch


def _check_output(path: Path) -> None:
    if path.suffix.lower() not in OUTPUTS:
        raise UserError(
            f"--output: {path.name!r} ends in neither .npy nor .parquet, which are the kinds of file written"
        )
    if path.is_dir():
        raise UserError(f"--output: {path} is a directory; name a file in it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output: there is no directory {path.parent}; make it first")
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "--output: writing .parquet needs pyarrow, not installed here: pip install 'visionkernels[parquet]'"
        )


def _write(path: Path, images: Sequence[Path], vectors: torch.Tensor) -> None:
    write = _write_parquet if path.suffix.lower() == ".parquet" else _write_npy
    try:
        write(path, images, vectors)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error}") from error


def _write_npy(path: Path, images: Sequence[Path], vectors: torch.Tensor) -> None:
    import numpy as np

    with path.open("wb") as file:  # np.save would add .npy to a name that ends in .NPY
        np.save(file, vectors.numpy())


def _write_parquet(path: Path, images: Sequence[Path], vectors: torch.Tensor) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    numbers = pa.FixedSizeListArray.from_arrays(pa.array(vectors.flatten().numpy()), vectors.shape[1])
    parquet.write_table(pa.table({"image": [str(image) for image in images], "embedding": numbers}), path)
