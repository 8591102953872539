"""The jobs `embed` and `classify` of the command: their arguments, and the functions that they call."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionkernels import _embed_report

_EMBED_HELP = """\
Turn images into vectors, such as for a search by similarity, with a vision transformer: ViT, DeiT, DINOv2 (with
registers), DINOv3, CLIP, SigLIP or BEiT. A vector is CLIP's projected embedding, else the pooled output, else the
class token.

--output vectors.npy holds one row of float32 an image, in the order of the arguments; --output vectors.parquet two
columns, image and embedding (needs pyarrow).

A model that gives NaN or infinity, such as one that float16 is too small for, is an error: nothing is written.
"""

_EMBED_EXAMPLES = """\
examples:
  visionkernels embed photos/*.jpg --model facebook/dinov2-base --output vectors.npy
  visionkernels embed photos/*.jpg --model openai/clip-vit-base-patch32 --normalize --output vectors.parquet
  visionkernels embed cat.jpg --model ./my-vit --json     for other programs: stdout holds nothing else
"""

_CLASSIFY_HELP = """\
Say what images show, by the classes of a vision transformer with a classifier: ViT, DeiT, DINOv2 (with registers),
CLIP, SigLIP or BEiT.

Scores are probabilities that sum to 1 (softmax). Where the checkpoint's config.json has the problem_type
multi_label_classification, and for a single label, each is a probability of its own (sigmoid); for regression they are
the model's numbers. A model that gives NaN or infinity is an error: nothing is printed.
"""

_CLASSIFY_EXAMPLES = """\
examples:
  visionkernels classify cat.jpg --model google/vit-base-patch16-224
  visionkernels classify photos/*.jpg --model facebook/deit-base-distilled-patch16-224 --top-k 1 --json
"""


def add_embed(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the job `embed` to the command."""
    job = subparsers.add_parser(
        "embed",
        help="turn images into vectors",
        description=_EMBED_HELP,
        epilog=_EMBED_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_images(job)
    job.add_argument("--output", metavar="FILE", type=Path, help="write the vectors to this .npy or .parquet file")
    job.add_argument("--normalize", action="store_true", help="divide each vector by its length")
    job.set_defaults(run=_run_embed)


def _run_embed(args: argparse.Namespace) -> None:
    from visionkernels import _embed_report

    report = _embed_report.embed(_request(args), args.output, args.normalize)
    (_embed_report.print_json if args.json else _embed_report.print_vectors)(report)


def add_classify(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the job `classify` to the command."""
    job = subparsers.add_parser(
        "classify",
        help="say what images show",
        description=_CLASSIFY_HELP,
        epilog=_CLASSIFY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_images(job)
    job.add_argument("--top-k", metavar="K", type=int, default=5, help="labels an image (default %(default)s)")
    job.set_defaults(run=_run_classify)


def _run_classify(args: argparse.Namespace) -> None:
    from visionkernels import _embed_report

    report = _embed_report.classify(_request(args), args.top_k)
    (_embed_report.print_json if args.json else _embed_report.print_labels)(report)


def _add_images(job: argparse.ArgumentParser) -> None:
    """What `embed` and `classify` take alike."""
    job.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image files, of any kind that Pillow reads")
    job.add_argument("--model", metavar="DIR_OR_HUB_ID", required=True, help="checkpoint of a vision transformer")
    job.add_argument("--batch-size", metavar="N", type=int, default=32, help="images at once (default %(default)s)")
    job.add_argument("--device", metavar="D", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    job.add_argument("--dtype", metavar="T", help="fp32, fp16 or bf16 (default: as the checkpoint has it)")
    job.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _request(args: argparse.Namespace) -> _embed_report.Request:
    from visionkernels import _embed_report

    return _embed_report.Request(args.images, args.model, args.batch_size, args.device, args.dtype, quiet=args.json)
