"""One training run: the model, its moving average and its optimizer, from checkpoint to checkpoint."""

import argparse
import copy
import math

import torch
from detector_data import Batches
from detector_loss import detection_loss
from detector_model import build_model, keep_boxes_in_float32, predict
from rich.console import Console
from torch import Tensor, nn

from visionkernels.synthetic import Dataset
from visionkernels.synthetic.score import average_precision

CONSOLE = Console(stderr=True)


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that does not decay biases and normalisation."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, fused=args.device.startswith("cuda"))


def learning_rate(step: int, progress: float, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine that reaches 1% of the peak when `progress` reaches 1."""
    return args.lr * min(1.0, (step + 1) / args.warmup) * (0.505 + 0.495 * math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights and batch statistics a little towards the model's."""
    ours, theirs = average.state_dict().values(), model.state_dict().values()
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)


class Run:
    """Everything that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.path = args, args.output / "checkpoint.pt"
        self.model = build_model().to(args.device)
        if args.device.startswith("cuda"):
            self.model.to(memory_format=torch.channels_last)
        self.model.loss_function = detection_loss
        self.attention = "transformers' own code"
        if not args.stock:
            from visionkernels import patch

            CONSOLE.print(f"patched: {patch(self.model)}")
            self.attention = "visionkernels"
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        keep_boxes_in_float32(self.model)
        self.optimizer = make_optimizer(self.model, args)
        # bfloat16 has float32's range and needs no scaling.
        self.scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.dtype == "float16")
        self.step, self.seconds, self.history = 0, 0.0, []

    def settings(self) -> dict:
        """What may not change between a run and its continuation."""
        free = {"output", "resume", "time_budget", "workers", "device", "checkpoint_every", "log_every"}
        return {name: value for name, value in vars(self.args).items() if name not in free}

    def save(self) -> None:
        """Write the checkpoint."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer", "scaler")}
        counters = {
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "settings": self.settings(),
        }
        part = self.path.with_suffix(".part")
        torch.save(parts | counters, part)
        part.replace(self.path)  # a stop while writing leaves the previous checkpoint whole

    def load(self) -> None:
        """Read the checkpoint, which must have been made with the same settings."""
        state = torch.load(self.path, map_location=self.args.device, weights_only=True)
        changed = {k: (v, self.settings()[k]) for k, v in state["settings"].items() if self.settings()[k] != v}
        if changed:
            raise SystemExit(f"error: {self.path} was made with other settings (then, now): {changed}")
        for name in ("model", "average", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        CONSOLE.print(f"resumed at step {self.step} after {self.seconds:.0f} s of training")

    def progress(self) -> float:
        """How much of the schedule is done; 1 or more: all."""
        limit = self.args.schedule_seconds
        return max(self.step / self.args.steps, self.seconds / limit if limit else 0.0)

    def train_step(self, batches: Batches) -> dict[str, Tensor]:
        """One update; returns the loss's terms."""
        args = self.args
        torch.manual_seed(args.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.progress(), args)
        images, labels = batches(self.step)
        dtype = getattr(torch, args.dtype)
        with torch.autocast(args.device.split(":")[0], dtype, enabled=args.dtype != "float32"):
            outputs = self.model(images, labels=labels)
        self.scaler.scale(outputs.loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        update_average(self.average, self.model, min(args.ema, self.step / (self.step + 10)))
        return outputs.loss_dict

    def evaluate(self, held_out: Dataset) -> dict[str, float]:
        """Score the averaged weights."""
        score = average_precision(predict(self.average, held_out), held_out)
        short = {name: round(score[name], 4) for name in ("AP", "AP50", "AP75")}
        self.history.append({"step": self.step, **short})
        CONSOLE.print(f"step {self.step}: held-out {short}")
        return score
