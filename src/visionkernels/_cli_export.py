"""`visionkernels export`: its help and its arguments."""

import argparse
from pathlib import Path
from typing import Any

_EXPORT_HELP = """\
Write a model for another runtime. MODEL is a Hugging Face checkpoint for images (a directory or hub id): a detector
with deformable attention, or a ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP or BEiT; "detector" (the one that ships); or
one of this package's own, with random weights: ms_deform_attn, fused_ms_deform_attn, MSDeformAttn, ViT.

formats:
  onnx                standard operators, for onnxruntime and any other runtime
  tensorrt            ONNX with one MultiscaleDeformableAttnPlugin_TRT node for each deformable attention; a ViT has
                      none, and is standard operators alone
  aoti                an AOTInductor package (.pt2) for this machine's CPU, or its GPU by --device, for Python and C++

Opset 18 is the default because TensorRT reads it right: opset 20 renamed GridSample's mode "bilinear" to "linear",
which TensorRT takes for nearest, without a word. Other runtimes take 16 to 23.

Ends with exit code 1 if --check finds that the artefact and PyTorch differ.
"""

_EXPORT_EXAMPLES = """\
examples:
  visionkernels export detector --format onnx --check
  visionkernels export PekingU/rtdetr_r50vd --format onnx --dynamic batch,height,width --output rtdetr.onnx --check
  visionkernels export detector --format tensorrt --dtype fp16 --dynamic batch
  visionkernels export detector --format aoti --dynamic batch --output detector.pt2
  visionkernels export facebook/dinov2-small --format aoti --device cuda --dtype fp16 --output dinov2.pt2 --check
"""


def add_job(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the job to the parser of the command."""
    job = subparsers.add_parser(
        "export",
        help="write a model as ONNX, ONNX for TensorRT, or an AOTInductor package",
        description=_EXPORT_HELP,
        epilog=_EXPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    job.add_argument("model", metavar="MODEL", help="a checkpoint, detector, or one of this package's own")
    job.add_argument("--format", metavar="F", required=True, help="onnx, tensorrt or aoti")
    job.add_argument(
        "--opset", metavar="N", type=int, default=18, help="of ONNX, 16 to 23 (default %(default)s, see above)"
    )
    job.add_argument(
        "--dynamic",
        metavar="SIZES",
        default="",
        help="sizes that stay open, such as batch,height,width (default: none)",
    )
    job.add_argument("--output", metavar="FILE", type=Path, help="the file to write (default: MODEL.onnx or MODEL.pt2)")
    job.add_argument("--dtype", metavar="T", default="fp32", help="fp32 or fp16 (default %(default)s)")
    job.add_argument(
        "--device", metavar="D", default="cpu", help="what aoti makes code for: cpu, cuda or cuda:<index> (default cpu)"
    )
    job.add_argument(
        "--plugin-version",
        metavar="V",
        default="2",
        help="of the TensorRT plugin: 2, 1 before 10.11, or visionkernels (default %(default)s)",
    )
    job.add_argument(
        "--keep-operators",
        action="store_true",
        help="have an AOTInductor package call this package's operators: who loads it must import visionkernels",
    )
    job.add_argument(
        "--check", action="store_true", help="run the artefact beside PyTorch, on random inputs and the sample picture"
    )
    job.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from visionkernels.export import command

    dynamic = tuple(name.strip() for name in args.dynamic.split(",") if name.strip())
    names = (args.model, args.format, args.opset, dynamic, args.output, args.dtype, args.plugin_version)
    return command.run(command.Options(*names, args.keep_operators, args.check, args.device))
