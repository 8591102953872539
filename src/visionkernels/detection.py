"""Find the objects in an image with a Hugging Face detector that runs on this package's operator."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from visionkernels._checkpoint import load_checkpoint, require
from visionkernels._devices import describe, find_device
from visionkernels._images import read_image
from visionkernels.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from visionkernels.integrations import PatchReport

ASSETS = Path(__file__).parent / "assets"
SHIPPED_MODEL = ASSETS / "detector"
SAMPLE_IMAGE = ASSETS / "sample.png"


@dataclass(frozen=True)
class Detections:
    """What a detector found, and how.

    Attributes:
        objects: As returned by `detect`.
        image: The picture that the boxes belong to: RGB and upright.
        device: Where the model ran, in words.
        first_seconds: The first pass through the model on this image, set-up and kernel compilation included.
        seconds: A second pass; None if there was none.
    """

    objects: list[dict[str, Any]]
    image: "Image.Image"
    device: str
    first_seconds: float
    seconds: float | None


class Detector:
    """A detection checkpoint with its image processor, loaded once and patched.

    Args:
        model: A directory or a model id on the Hugging Face hub; by default the detector that ships with the
            package.
        device: `"cpu"`, `"cuda"` or `"cuda:<index>"`; by default a GPU if there is one.

    Attributes:
        name: Which checkpoint it is.
        device: The device that the model is on.
        model: The transformers model, in float32 and in evaluation mode.
        processor: Its image processor.
        report: What `visionkernels.patch` replaced, or None if the model has nothing that it replaces
            and runs as transformers wrote it.

    Raises:
        UserError: If transformers is missing, the device is not there, or the checkpoint is none, is
            incomplete, or is no detector.

    Example:
        >>> Detector(device="cpu")(SAMPLE_IMAGE).objects[0]["label"]  # doctest: +SKIP
        'star'
    """

    def __init__(self, model: str | Path | None = None, *, device: str | torch.device | None = None) -> None:
        require("transformers", "PIL", "scipy")
        self.device = find_device(device)
        self.name = "the detector that ships with visionkernels" if model is None else str(model)
        if model is None and not SHIPPED_MODEL.is_dir():
            raise UserError("model: this installation lacks the detector that ships with it; name one with --model")
        self.processor, self.model = load_checkpoint(SHIPPED_MODEL if model is None else model)
        self.model = self.model.to(self.device).eval()
        self.report = _patch(self.model)

    def __call__(self, image: Any, *, threshold: float = 0.5, time_twice: bool = False) -> Detections:
        """Find the objects in `image`.

        Args:
            image: As for `detect`.
            threshold: As for `detect`.
            time_twice: Run the model once more, to tell its time without the set-up of a first run.

        Returns:
            The objects and how they were found.

        Raises:
            UserError: As for `detect`.
        """
        check_threshold(threshold)
        picture = read_image(image)
        inputs = self.processor(images=picture, return_tensors="pt").to(self.device)
        outputs, first = self._run(inputs)
        second = self._run(inputs)[1] if time_twice else None
        size = [(picture.height, picture.width)]
        found = self.processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=size)[0]
        return Detections(self._objects(found, picture), picture, describe(self.device), first, second)

    @torch.inference_mode()
    def _run(self, inputs: Any) -> tuple[Any, float]:
        self._wait()
        start = time.perf_counter()
        outputs = self.model(**inputs)
        self._wait()
        return outputs, time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _objects(self, found: dict[str, torch.Tensor], picture: "Image.Image") -> list[dict[str, Any]]:
        order = found["scores"].argsort(descending=True, stable=True)
        limit = torch.tensor([picture.width, picture.height] * 2)
        boxes = found["boxes"][order].cpu().clamp(min=0).minimum(limit).tolist()
        names = self.model.config.id2label
        return [
            {
                "score": score,
                "label": names[label],
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
            }
            for score, label, box in zip(
                found["scores"][order].tolist(), found["labels"][order].tolist(), boxes, strict=True
            )
        ]


def detect(
    image: Any,
    model: "str | Path | Detector | None" = None,
    *,
    threshold: float = 0.5,
    device: str | torch.device | None = None,
) -> list[dict[str, Any]]:
    """Find the objects in an image.

    Args:
        image: A path, a PIL image, or a NumPy array or torch tensor `[height, width, 3]` of uint8 RGB. EXIF
            orientation is applied; grey, palette, 16-bit and transparent pictures are converted.
        model: A directory or hub id of any transformers object-detection checkpoint, or a `Detector`
            to use again; by default the small detector of synthetic shapes that ships with the package. Its
            multi-scale deformable attention is replaced by this package's operator; a model without one runs
            as it is.
        threshold: Objects with a lower score are left out; in [0, 1].
        device: `"cpu"`, `"cuda"` or `"cuda:<index>"`; by default a GPU if there is one.

    Returns:
        One `{"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}}` an object, the surest first; boxes
        in pixels of the upright image, inside it.

    Raises:
        UserError: In one sentence, if an argument cannot be used.

    Example:
        >>> import visionkernels as vk
        >>> vk.detect("sample.png", device="cpu")  # doctest: +SKIP
        [{'score': 0.95, 'label': 'star', 'box': {'xmin': 31.2, 'ymin': 50.9, 'xmax': 98.0, 'ymax': 121.4}},
        ...]
    """
    check_threshold(threshold)
    if isinstance(model, Detector):
        if device is not None and find_device(device) != model.device:
            raise UserError(
                f"device: {device} was asked for, but the given Detector is on {model.device}; leave it out"
            )
        return model(image, threshold=threshold).objects
    picture = read_image(image)  # a wrong path should not wait for a model to load
    return Detector(model, device=device)(picture, threshold=threshold).objects


def check_threshold(threshold: float) -> None:
    """Raise a UserError unless `threshold` is in [0, 1]."""
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise UserError(f"threshold: expected a number from 0 to 1, but it is {threshold!r}")


def _patch(model: torch.nn.Module) -> "PatchReport | None":
    from visionkernels.integrations import patch

    try:
        return patch(model)
    except ValueError:  # patch's way to say that nothing in the model can be replaced; the caller shows it
        return None
