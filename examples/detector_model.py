"""The small RT-DETR that `train_detector.py` trains: its configuration, its start values, and its files."""

import json
import platform
from pathlib import Path
from types import MethodType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessorPil, RTDetrResNetConfig

import visionkernels
from visionkernels.synthetic import CLASSES, Dataset


def build_model() -> RTDetrForObjectDetection:
    """RT-DETR with a ResNet of four narrow stages and three decoder layers, 3.8 million parameters."""
    backbone = RTDetrResNetConfig(
        embedding_size=48,  # the first stage keeps width and resolution
        hidden_sizes=[48, 72, 128, 192],
        depths=[1, 2, 2, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_hidden_dim=128,
        encoder_in_channels=[72, 128, 192],
        encoder_ffn_dim=512,
        hidden_expansion=0.5,
        d_model=128,
        decoder_in_channels=[128, 128, 128],
        decoder_ffn_dim=512,
        decoder_layers=3,
        num_queries=60,
        num_denoising=60,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: label for label, name in enumerate(CLASSES)},
    )
    model = RTDetrForObjectDetection(config)
    # transformers draws every weight small, which suits fine-tuning; from nothing, signals must keep their
    # size.
    special = ("sampling_offsets", "attention_weights", "class_embed", "enc_score_head")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and not any(part in name for part in special):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    # Boxes start as their anchors.
    for head in [model.model.enc_bbox_head, *model.model.decoder.bbox_embed]:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    return model


def _forward_in_float32(self: nn.Module, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return type(self).forward(self, hidden.float())


def keep_boxes_in_float32(model: RTDetrForObjectDetection) -> None:
    """Exempt from autocast what boxes pass through; a bfloat16 box is off by up to half a pixel in 256."""
    inner = model.model
    heads = [inner.enc_score_head, inner.enc_bbox_head, *inner.decoder.class_embed, *inner.decoder.bbox_embed]
    for module in [*inner.decoder_input_proj, *heads]:
        module.forward = MethodType(_forward_in_float32, module)


@torch.inference_mode()
def predict(model: RTDetrForObjectDetection, dataset: Dataset, batch_size: int = 64) -> list[dict]:
    """Boxes of every image of `dataset`, in pixels, as `visionkernels.synthetic.score` wants them."""
    processor = RTDetrImageProcessorPil()
    size, device = dataset.images.shape[1], model.device
    found = []
    for start in range(0, len(dataset), batch_size):
        images = torch.from_numpy(dataset.images[start : start + batch_size]).to(device)
        outputs = model(images.permute(0, 3, 1, 2).float() / 255)
        sizes = torch.full((len(images), 2), size, device=device)
        rows = processor.post_process_object_detection(outputs, threshold=0.001, target_sizes=sizes)
        found += [{name: value.cpu().numpy() for name, value in row.items()} for row in rows]
    return found


def save_detector(model: RTDetrForObjectDetection, folder: Path, image_size: int, metrics: dict, command: str) -> None:
    """Write what transformers' `from_pretrained(folder)` reads, and the card.

    Weights are stored in float16 (8 MB at most) and loaded as float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    state = {k: v.contiguous().cpu().clone() for k, v in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets nobody but the owner read it
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    RTDetrImageProcessorPil(size=size).save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (folder / "README.md").write_text(_card(model, metrics, command))


def _card(model: nn.Module, metrics: dict, command: str) -> str:
    score, run = metrics["held_out"], metrics["training"]
    classes = "\n".join(f"| {name} | {score[f'AP/{name}']:.3f} |" for name in CLASSES)
    size = f"{run['image_size']} x {run['image_size']}"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: object-detection
tags: [rt_detr, object-detection, multi-scale-deformable-attention]
---

# A small detector of synthetic shapes

RT-DETR (`RTDetrForObjectDetection` of transformers) with {parameters:.1f} million parameters, trained from
random weights on images that `visionkernels.synthetic` draws. It ships with visionkernels so that
`visionkernels detect` has something to run without a download, and so that the tests can tell whether a
trained detector still scores what it did. No photograph and no other data went into it.

## Score

COCO average precision (pycocotools) on {score["images"]} held-out images (series {score["seed"]} of the
generator; training used series {run["seed"]}), weights as stored here in float16, computed in float32:

| AP | AP50 | AP75 |
|---|---|---|
| {score["AP"]:.3f} | {score["AP50"]:.3f} | {score["AP75"]:.3f} |

| class | AP |
|---|---|
{classes}

## Training

```
{command}
```

{run["steps"]} steps of {run["batch_size"]} images, out of {run["images"]} of {size} pixels, flipped, turned
and recoloured; AdamW, {run["dtype"]} autocast, moving average of the weights; multi-scale deformable
attention by {run["attention"]}. {run["seconds"]:.0f} seconds on one {run["device"]}; {run["versions"]}.

## Limits

It knows flat shapes with sharp borders, at least a tenth of the image across, on patterned backgrounds, as
the generator draws them. It is no detector for photographs. Images are resized to {size} whatever their
aspect; with more than {model.config.num_queries} objects some are missed.
"""


def versions() -> str:
    """The versions that a result depends on, in words."""
    import transformers

    parts = [
        f"visionkernels {visionkernels.__version__}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]
    if torch.cuda.is_available():
        import triton

        parts.append(f"Triton {triton.__version__}")
    return ", ".join(parts)
