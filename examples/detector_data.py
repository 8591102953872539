"""Training batches of the synthetic task, put together and augmented on the device."""

import torch
from torch import Tensor

from visionkernels.synthetic import Dataset


class Batches:
    """Training batches, a function of (seed, step): an epoch is a permutation of the images."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, device: str) -> None:
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.images = torch.from_numpy(dataset.images).to(device)
        low, high = torch.from_numpy(dataset.boxes).to(device).div(dataset.images.shape[1]).split(2, dim=-1)
        self.boxes = torch.cat([(low + high) / 2, high - low], dim=-1)  # (cx, cy, w, h) in [0, 1]
        self.labels = torch.from_numpy(dataset.labels).to(device)
        self.counts = torch.from_numpy((dataset.labels >= 0).sum(1))

    def __call__(self, step: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Images `[B, 3, size, size]` float32 in [0, 1], and transformers' labels."""
        per_epoch = len(self.images) // self.batch_size
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.seed + 1000 * epoch))
        chosen = order[position * self.batch_size :][: self.batch_size]
        index = chosen.to(self.device, non_blocking=True)
        images, boxes = augment(self.images[index].permute(0, 3, 1, 2).float() / 255, self.boxes[index])
        rows = zip(boxes, self.labels[index], self.counts[chosen].tolist(), strict=True)
        return images, [{"class_labels": labels[:n], "boxes": box[:n]} for box, labels, n in rows]


def augment(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Flip, transpose and recolour each image; boxes are (cx, cy, w, h)."""
    batch, device = len(images), images.device
    for axis in (0, 1):  # x, y
        chosen = torch.rand(batch, device=device) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(3 - axis), images)
        boxes = boxes.clone()
        boxes[..., axis] = torch.where(chosen[:, None], 1 - boxes[..., axis], boxes[..., axis])
    chosen = torch.rand(batch, device=device) < 0.5
    images = torch.where(chosen[:, None, None, None], images.transpose(2, 3), images)
    boxes = torch.where(chosen[:, None, None], boxes[..., [1, 0, 3, 2]], boxes)
    channels = torch.rand(batch, 3, device=device).argsort(1)
    images = images[torch.arange(batch, device=device)[:, None], channels]
    contrast, brightness = torch.rand(2, batch, 1, 1, 1, device=device).unbind(0)
    return ((images - 0.5) * (0.7 + 0.6 * contrast) + 0.4 + 0.2 * brightness).clamp(0, 1), boxes
