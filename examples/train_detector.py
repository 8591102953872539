r"""Train the detector that ships with visionkernels, or one like it, on synthetic images.

    python examples/train_detector.py --output detector            # the shipped model's settings; wants a GPU
    python examples/train_detector.py --output detector --resume   # go on from the last checkpoint
    python examples/train_detector.py --output /tmp/tiny --device cpu --image-size 128 --images 64 \
        --held-out 32 --batch-size 8 --steps 300                   # see it learn on a laptop

Needs `pip install 'visionkernels[hf]' pycocotools`. Every random number of a step follows from (seed,
step), so a resumed run goes on as if it had not stopped. A second series of images, not trained on, gives the
score.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from detector_data import Batches
from detector_model import predict, save_detector, versions
from detector_run import CONSOLE, Run
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from visionkernels.synthetic import HELD_OUT_SEED, TRAIN_SEED, Dataset, make_dataset
from visionkernels.synthetic.score import average_precision


def parse_args() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the checkpoint and the finished model")
    add("--resume", action="store_true", help="go on from OUTPUT/checkpoint.pt, if there is one")
    add("--steps", type=int, default=12000, help="length of the schedule (default %(default)s)")
    add(
        "--schedule-seconds",
        type=float,
        help="end the schedule after this training time, if that is before --steps",
    )
    add(
        "--time-budget",
        type=float,
        help="stop this call, with a checkpoint, after so many seconds; then --resume",
    )
    add("--batch-size", type=int, default=128)
    add(
        "--images",
        type=int,
        default=32768,
        help="training images, kept on the device (default %(default)s: 6.4 GB)",
    )
    add(
        "--held-out",
        type=int,
        default=1000,
        help="images that the score is measured on (default %(default)s)",
    )
    add("--image-size", type=int, default=256)
    add("--lr", type=float, default=8e-4)
    add("--weight-decay", type=float, default=1e-4)
    add("--warmup", type=int, default=500, help="steps of linear warm-up (default %(default)s)")
    add("--ema", type=float, default=0.999, help="decay of the weights' moving average (default %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="autocast (default %(default)s)",
    )
    add("--stock", action="store_true", help="keep transformers' own attention instead of visionkernels'")
    add("--workers", type=int, default=min(cores, 14), help="processes that draw images (default %(default)s)")
    add("--checkpoint-every", type=int, default=1000, metavar="STEPS")
    add("--evaluate-every", type=int, default=4000, metavar="STEPS")
    add("--log-every", type=int, default=100, metavar="STEPS")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "images", "held_out", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, but it is {getattr(args, name)}")
    if args.batch_size > args.images:
        parser.error(f"--batch-size ({args.batch_size}) must not exceed --images ({args.images})")
    if args.image_size % 32:
        parser.error(f"--image-size must be a multiple of 32, but it is {args.image_size}")
    return args


def train(run: Run, batches: Batches, held_out: Dataset, started: float) -> bool:
    """Train until the schedule is done (True) or this call's time is spent (False)."""
    args = run.args
    columns = [
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    ]
    with Progress(*columns, console=CONSOLE) as bar:
        task = bar.add_task("", total=args.steps, completed=run.step)
        before, since = time.perf_counter(), run.step
        while run.progress() < 1:
            terms = run.train_step(batches)
            if run.step % args.log_every == 0 or run.step in (1, args.steps):
                values = {name.removeprefix("loss_"): round(term.item(), 3) for name, term in terms.items()}
                if not math.isfinite(sum(values.values())):
                    raise SystemExit(f"error: the loss is not finite at step {run.step}: {values}")
            now = time.perf_counter()
            run.seconds, before = run.seconds + now - before, now
            if run.step % args.log_every == 0 or run.step == 1:
                speed = (run.step - since) * args.batch_size / max(now - started, 1e-9)
                line = f"{run.seconds:.0f} s, loss {sum(values.values()):.3f} {values}"
                bar.update(task, completed=run.step, description=line)
                if not CONSOLE.is_terminal:  # where no bar is drawn, say it in lines
                    CONSOLE.print(
                        f"step {run.step} ({100 * run.progress():.1f}%, {speed:.0f} images/s), {line}",
                        soft_wrap=True,
                    )
            if run.step % args.evaluate_every == 0:
                run.evaluate(held_out)
                before = time.perf_counter()  # evaluation is no training time
            if run.step % args.checkpoint_every == 0:
                run.save()
            if args.time_budget and time.perf_counter() - started > args.time_budget and run.progress() < 1:
                run.save()
                return False
    run.save()
    return True


def command_line(args: argparse.Namespace) -> str:
    """The command that repeats this run: what differs from the defaults, without paths and time limits."""
    changed = [
        "seed",
        "steps",
        "images",
        "held_out",
        "image_size",
        "batch_size",
        "lr",
        "weight_decay",
        "warmup",
        "ema",
        "dtype",
    ]
    options = "".join(f" --{name.replace('_', '-')} {getattr(args, name)}" for name in changed)
    limit = f" --schedule-seconds {args.schedule_seconds:g}" if args.schedule_seconds else ""
    stock = " --stock" if args.stock else ""
    return f"python examples/train_detector.py --output detector{options}{limit}{stock}"


def main() -> None:
    started = time.perf_counter()
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with Progress(*Progress.get_default_columns(), console=CONSOLE) as bar:
        task = bar.add_task(f"drawing {args.images} images", total=args.images + args.held_out)
        common = {
            "size": args.image_size,
            "workers": args.workers,
            "progress": lambda n: bar.advance(task, n),
        }
        dataset = make_dataset(args.images, TRAIN_SEED, **common)
        held_out = make_dataset(args.held_out, HELD_OUT_SEED, **common)
    CONSOLE.print(f"drew {args.images + args.held_out} images in {time.perf_counter() - started:.0f} s")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # the sizes never change
    run = Run(args)
    if args.resume and run.path.exists():
        run.load()
    if not train(run, Batches(dataset, args.batch_size, args.seed, args.device), held_out, started):
        CONSOLE.print(f"stopped at step {run.step} ({100 * run.progress():.1f}%): go on with --resume")
        return
    run.average.load_state_dict(
        {k: v.half().to(v) if v.is_floating_point() else v for k, v in run.average.state_dict().items()}
    )
    torch.set_float32_matmul_precision("highest")  # the score in the card is that of plain float32
    torch.backends.cudnn.allow_tf32 = False
    score = run.evaluate(held_out)
    first = held_out.first(64)  # few enough for the test suite to repeat on a CPU
    metrics = {
        "held_out": {"seed": HELD_OUT_SEED, "images": args.held_out, **score},
        "held_out_first": {"images": len(first), **average_precision(predict(run.average, first), first)},
        "training": {
            "seed": TRAIN_SEED,
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
            "versions": versions(),
            "attention": run.attention,
            "seconds": round(run.seconds, 1),
            **{name: getattr(args, name) for name in ("images", "image_size", "batch_size", "dtype", "lr")},
            "steps": run.step,
        },
        "history": run.history,
    }
    save_detector(run.average, args.output, args.image_size, metrics, command_line(args))
    print(json.dumps({name: score[name] for name in ("AP", "AP50", "AP75")}))


if __name__ == "__main__":
    main()
