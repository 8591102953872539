"""RT-DETR's training loss over a whole batch at once.

The terms and weights are those of transformers' `RTDetrForObjectDetectionLoss`, which loops over images and
layers in Python, which for a small model takes longer than the rest of a step. (In transformers 5.17 it also
matches the last layer's denoising queries to the objects, so that the queries that count learn little there.)

Source: Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", arXiv:2304.08069.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def generalized_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes `[..., 4]` (cx, cy, w, h), over broadcast leading axes."""
    a_low, a_high = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    b_low, b_high = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    both = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - both
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    iou = both / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, target_labels: Tensor, target_boxes: Tensor, counts: list[int], config):
    """The query that each object is matched to, by the Hungarian algorithm.

    Args:
        logits: `[B, K, Q, C]` of K layers.
        boxes: `[B, K, Q, 4]`.
        target_labels: `[B, T]`, padded.
        target_boxes: `[B, T, 4]`, padded.
        counts: Objects of each image.
        config: RT-DETR's configuration (costs).

    Returns:
        `[B, K, T]` int64 on the logits' device; 0 in the padding.
    """
    batch, layers, queries, _ = logits.shape
    prob = logits.sigmoid()
    alpha, gamma = config.matcher_alpha, config.matcher_gamma
    negative = (1 - alpha) * prob**gamma * -(1 - prob + 1e-8).log()
    positive = alpha * (1 - prob) ** gamma * -(prob + 1e-8).log()
    labels = target_labels[:, None, None].expand(batch, layers, queries, -1)
    targets = target_boxes[:, None, None]
    cost = config.matcher_class_cost * (positive - negative).gather(3, labels)
    cost += config.matcher_bbox_cost * (boxes[:, :, :, None] - targets).abs().sum(-1)
    cost -= config.matcher_giou_cost * generalized_iou(boxes[:, :, :, None], targets)[1]
    cost = torch.nan_to_num(cost, nan=1e9, posinf=1e9, neginf=-1e9).cpu().numpy()
    matched = torch.zeros(batch, layers, target_labels.shape[1], dtype=torch.int64)
    for image, count in enumerate(counts):
        for layer in range(layers):
            query, target = linear_sum_assignment(cost[image, layer, :, :count])
            matched[image, layer, target] = torch.from_numpy(query)
    return matched.to(logits.device, non_blocking=True)


def _losses(logits, boxes, matched, target_labels, target_boxes, real, config) -> dict[str, Tensor]:
    """Varifocal, L1 and GIoU sums; axis K holds layers or denoising groups, `matched` is `[B, K, T]`."""
    batch, layers, queries, classes = logits.shape
    targets = target_boxes[:, None].expand(-1, layers, -1, -1)
    chosen = boxes.gather(2, matched[..., None].expand(-1, -1, -1, 4))
    iou, giou = generalized_iou(chosen, targets)
    real = real[:, None].expand(-1, layers, -1)
    # One row more than there are queries takes what the padding writes.
    row = torch.where(real, matched, queries)
    hot = torch.zeros(batch, layers, queries + 1, classes, device=logits.device)
    quality = torch.zeros_like(hot)
    index = row * classes + target_labels[:, None]
    hot = hot.flatten(2).scatter(2, index, 1.0).view_as(hot)[:, :, :queries]
    quality = quality.flatten(2).scatter(2, index, iou.detach()).view_as(quality)[:, :, :queries]
    weight = config.focal_loss_alpha * logits.detach().sigmoid() ** config.focal_loss_gamma * (1 - hot) + quality
    return {
        "loss_vfl": F.binary_cross_entropy_with_logits(logits, quality, weight, reduction="sum"),
        "loss_bbox": ((chosen - targets).abs().sum(-1) * real).sum(),
        "loss_giou": ((1 - giou) * real).sum(),
    }


def detection_loss(
    logits,
    labels,
    device,
    pred_boxes,
    config,
    outputs_class=None,
    outputs_coord=None,
    enc_topk_logits=None,
    enc_topk_bboxes=None,
    denoising_meta_values=None,
    **_,
):
    """Drop-in for `model.loss_function` of RT-DETR; see transformers for the arguments.

    Returns:
        The loss, its weighted terms, and None (no auxiliary outputs).
    """
    counts = [len(target["class_labels"]) for target in labels]
    target_labels = pad_sequence([target["class_labels"] for target in labels], batch_first=True)
    target_boxes = pad_sequence([target["boxes"] for target in labels], batch_first=True).float()
    length = target_labels.shape[1]
    real = torch.arange(length, device=device) < torch.tensor(counts, device=device)[:, None]
    outputs_class, outputs_coord = outputs_class.float(), outputs_coord.float()
    denoising = denoising_meta_values["dn_num_split"][0] if denoising_meta_values else 0

    # The proposals that top-k picked are one more layer: [B, K + 1, Q, ...].
    all_logits = torch.cat([outputs_class[:, :, denoising:], enc_topk_logits[:, None].float()], dim=1)
    all_boxes = torch.cat([outputs_coord[:, :, denoising:], enc_topk_bboxes[:, None].float()], dim=1)
    matched = match(all_logits, all_boxes, target_labels, target_boxes, counts, config)
    terms = _losses(all_logits, all_boxes, matched, target_labels, target_boxes, real, config)
    if denoising:
        # Queries [K, G groups, (positive, negative), T]: the j-th positive of each group stands for object j.
        groups = denoising_meta_values["dn_num_group"]
        noisy_logits = outputs_class[:, :, :denoising].unflatten(2, (groups, 2 * length)).flatten(1, 2)
        noisy_boxes = outputs_coord[:, :, :denoising].unflatten(2, (groups, 2 * length)).flatten(1, 2)
        own = torch.arange(length, device=device).expand(len(counts), noisy_logits.shape[1], length)
        extra = _losses(noisy_logits, noisy_boxes, own, target_labels, target_boxes, real, config)
        terms = {name: terms[name] + extra[name] / groups for name in terms}
    weights = {name: getattr(config, f"weight_{name}") for name in terms}
    terms = {name: weights[name] * term / max(sum(counts), 1) for name, term in terms.items()}
    return sum(terms.values()), terms, None
