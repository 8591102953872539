"""What `visionkernels detect` does and shows: a table or JSON, and the drawn picture."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionkernels._checkpoint import require
from visionkernels._devices import find_device
from visionkernels._images import check_output, draw_boxes, read_image, write_image
from visionkernels.detection import Detections, Detector, check_threshold


@dataclass(frozen=True)
class Report:
    """One run of the command.

    Attributes:
        image: The image file.
        model: Which checkpoint, in words.
        model_class: The transformers class.
        replaced: How many attention modules run on this package's operator.
        threshold: The lowest score shown.
        output: The drawn picture, if one was asked for.
        found: The objects, the device and the times.
    """

    image: Path
    model: str
    model_class: str
    replaced: int
    threshold: float
    output: Path | None
    found: Detections


def run(
    image: Path, model: str | None, output: Path | None, threshold: float, device: str | None, *, quiet: bool
) -> Report:
    """Find the objects in `image`, and draw them into `output`.

    Everything that can be wrong with the arguments is looked at before a model is loaded.

    Raises:
        UserError: If something cannot be used.
    """
    require("PIL", "rich")
    check_threshold(threshold)
    find_device(device)
    if output is not None:
        check_output(output)
    picture = read_image(image)
    silence_transformers()
    with spinner("loading the model", quiet):
        detector = Detector(model, device=device)
    with spinner("looking for objects", quiet):
        found = detector(picture, threshold=threshold, time_twice=True)
    if output is not None:
        write_image(draw_boxes(found.image, found.objects), output)
    replaced = 0 if detector.report is None else len(detector.report)
    return Report(image, detector.name, type(detector.model).__name__, replaced, threshold, output, found)


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON's types; `objects` is what `visionkernels.detect` returns."""
    return {
        "image": str(report.image),
        "width": report.found.image.width,
        "height": report.found.image.height,
        "model": report.model,
        "model_class": report.model_class,
        "replaced_modules": report.replaced,
        "device": report.found.device,
        "threshold": report.threshold,
        "first_seconds": report.found.first_seconds,
        "seconds": report.found.seconds,
        "output": None if report.output is None else str(report.output),
        "objects": report.found.objects,
    }


def print_table(report: Report) -> None:
    """Print the objects, then what ran, where, and how long it took."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    found = report.found
    count = f"{len(found.objects)} object{'' if len(found.objects) == 1 else 's'}"
    table = Table(title=f"{report.image.name}: {count} with a score of {report.threshold:g} or more")
    table.add_column("label")
    for name in ("score", "xmin", "ymin", "xmax", "ymax"):
        table.add_column(name, justify="right")
    for one in found.objects:
        table.add_row(one["label"], f"{one['score']:.3f}", *(f"{value:.1f}" for value in one["box"].values()))
    console.print(table)
    seconds = found.first_seconds if found.seconds is None else found.seconds
    time = f"{report.model_class} took {1000 * seconds:.1f} ms on {found.device}"
    console.print(f"{time}; its first run, with set-up, took {1000 * found.first_seconds:.0f} ms")
    if report.replaced:
        console.print(f"attention: {report.replaced} modules replaced by visionkernels' operator")
    else:
        console.print("attention: nothing was replaced; this model holds no attention that visionkernels knows")
    if report.output is not None:
        console.print(f"drawn into {report.output}")


@contextlib.contextmanager
def spinner(what: str, quiet: bool) -> Iterator[None]:
    """Show on stderr of a terminal that something takes a while."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(f"{what} ..."):
        yield


def silence_transformers() -> None:
    """Leave stderr to the spinner and to errors; transformers would say the same again, at length."""
    if importlib.util.find_spec("transformers") is None:
        return  # Detector says so
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity(50)  # critical only: each retry of a download would be a line
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        import warnings

        warnings.filterwarnings("ignore", module="transformers")
