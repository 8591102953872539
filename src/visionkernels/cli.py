"""The `visionkernels` command: parses arguments and calls functions."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from visionkernels import __version__, _cli_export, _cli_images
from visionkernels.errors import UserError

_DETECT_HELP = """\
Find the objects in an image: print them in a table, and draw them into a picture.

Any Hugging Face object-detection checkpoint runs, from a directory or by its id on the hub. Its multi-scale
deformable attention, if it has one, is replaced by this package's operator. Without --model, a small detector
of synthetic shapes that ships with the package is used, and nothing is downloaded.
"""

_DETECT_EXAMPLES = """\
examples:
  visionkernels detect --sample --output found.png     the image and the detector that ship with the package
  visionkernels detect street.jpg --model PekingU/rtdetr_r50vd --output found.png
  visionkernels detect street.jpg --model ./my-detector --threshold 0.3 --device cpu
  visionkernels detect street.jpg --json > found.json  for other programs: stdout holds nothing else
"""

_BENCH_HELP = """\
Measure the operators beside their peers, in one run: first how far a result is from float64, then the time
of forward, backward and both, the time a call costs the host, the memory, and the share of the device's
copy bandwidth. Peers are PyTorch's grid_sample, the same under torch.compile, what transformers runs, and,
where they can be imported, the extension of Deformable-DETR, msda-triton, mmcv and DCNv4.

suites:
  msda                the operator alone, on the workloads of known models
  msda-module         a whole attention module, forward and backward: time and memory
  msda-queries        the operator over a growing number of queries
  vit                 whole vision transformers, beside transformers and timm: time, memory, TFLOP/s; and of some
                      where the time goes
  vit-ops             their operators over sizes, beside PyTorch's functions, cuBLAS and the kernels of
                      scaled_dot_product_attention

Ends with exit code 1 if a result of this package's is wrong.
"""

_BENCH_EXAMPLES = """\
examples:
  visionkernels bench --quick                          under a minute, on a CPU too
  visionkernels bench --save                           every suite, into benchmarks/results
  visionkernels bench --suite msda --case encoder-n4 decoder-n1 --dtype fp16 --against grid_sample
  visionkernels bench --suite vit --case vit-b-n1 --against timm-graph timm-compile
  visionkernels bench --list                           the cases and the providers
  visionkernels bench --plot benchmarks/results/*.json plots of results, measured here or elsewhere
"""

_DOCTOR_HELP = """\
Print what is installed, the devices, and which way every operator goes on each of them and why; then run
every operator on small random calls and compare output and gradients with float64. Takes about ten seconds on
a CPU; on a GPU the first run compiles the kernels.

Ends with exit code 1 if a result is wrong or an operator fails.
"""

_INTEGRATIONS_HELP = """\
Print the code bases that this package's operator can be put into: what is replaced there, the versions it is
tested with, and the line that switches it on. With --model, say what that line would replace in a checkpoint
of Hugging Face transformers.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line; argparse would print the whole usage before it.
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command and all its jobs."""
    parser = _Parser(
        prog="visionkernels",
        description="Triton kernels for vision transformers.",
        epilog="visionkernels JOB --help explains a job, with examples",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"visionkernels {__version__}")
    subparsers = parser.add_subparsers(title="jobs", metavar="JOB", required=True)
    _add_detect(subparsers)
    _cli_images.add_embed(subparsers)
    _cli_images.add_classify(subparsers)
    _add_bench(subparsers)
    _add_doctor(subparsers)
    _add_integrations(subparsers)
    _cli_export.add_job(subparsers)
    return parser


def _add_detect(subparsers: "argparse._SubParsersAction[_Parser]") -> None:
    job = subparsers.add_parser(
        "detect",
        help="find the objects in an image",
        description=_DETECT_HELP,
        epilog=_DETECT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    job.add_argument("image", metavar="IMAGE", nargs="?", type=Path, help="image file, of any kind that Pillow reads")
    job.add_argument("--sample", action="store_true", help="use the image that ships with the package")
    job.add_argument("--model", metavar="DIR_OR_HUB_ID", help="detection checkpoint (default: the one that ships)")
    job.add_argument("--output", metavar="OUT.png", type=Path, help="draw the objects into this picture")
    job.add_argument(
        "--threshold", metavar="T", type=float, default=0.5, help="lowest score, 0 to 1 (default %(default)s)"
    )
    job.add_argument("--device", metavar="D", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    job.add_argument("--json", action="store_true", help="print JSON instead of a table")
    job.set_defaults(run=_run_detect)


def _run_detect(args: argparse.Namespace) -> None:
    from visionkernels import _detect_report, detection

    if args.sample == (args.image is not None):
        what = "both an image and --sample were given" if args.sample else "no image was given"
        raise UserError(f"{what}: name one image file, or try --sample, the image that ships with the package")
    image = detection.SAMPLE_IMAGE if args.sample else args.image
    report = _detect_report.run(image, args.model, args.output, args.threshold, args.device, quiet=args.json)
    if args.json:
        print(json.dumps(_detect_report.as_json(report), indent=2))
    else:
        _detect_report.print_table(report)


def _add_bench(subparsers: "argparse._SubParsersAction[_Parser]") -> None:
    job = subparsers.add_parser(
        "bench",
        help="measure the operators beside their peers",
        description=_BENCH_HELP,
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    job.add_argument("--suite", metavar="NAME", nargs="+", help="what to measure (default: all suites)")
    job.add_argument(
        "--dtype",
        metavar="T",
        nargs="+",
        help="of fp64, fp32, fp16, bf16 (default: fp16 fp32, of the main cases bf16 too; of the suites vit fp16; on a"
        " CPU fp32)",
    )
    job.add_argument(
        "--against", metavar="PROVIDER", nargs="*", help="peers (default: those that can be imported; nothing: none)"
    )
    job.add_argument("--case", metavar="NAME", nargs="+", help="workloads, or all (default: the usual ones)")
    job.add_argument("--quick", action="store_true", help="small cases, and a shorter time for each figure")
    job.add_argument(
        "--save",
        metavar="DIR",
        nargs="?",
        type=Path,
        const=Path("benchmarks/results"),
        help="write a result file for each suite and device into this directory, in place of an older one,"
        " after each case (default: %(const)s)",
    )
    job.add_argument("--device", metavar="D", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    job.add_argument(
        "--resume", action="store_true", help="go on with the files of a run that was ended, in --save DIR"
    )
    job.add_argument("--list", action="store_true", help="print the cases and the providers, and measure nothing")
    job.add_argument(
        "--plot",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="plot these result files as PNG and SVG, beside them or into --save DIR, and measure nothing",
    )
    job.set_defaults(run=_run_bench)


def _run_bench(args: argparse.Namespace) -> int:
    from visionkernels.bench import run

    if args.list:
        print(run.listing())
        return 0
    if args.plot:
        from visionkernels.bench import plots

        for path in plots.draw_files(args.plot, args.save):
            print(path)
        return 0
    names = (args.suite, args.dtype, args.against, args.case)
    return run.run(run.Options(*names, args.quick, args.save, args.device, args.resume))


def _add_doctor(subparsers: "argparse._SubParsersAction[_Parser]") -> None:
    job = subparsers.add_parser(
        "doctor",
        help="say what is installed and whether the operators work here",
        description=_DOCTOR_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    job.add_argument("--json", action="store_true", help="print JSON instead of text")
    job.set_defaults(run=_run_doctor)


def _run_doctor(args: argparse.Namespace) -> int:
    from visionkernels import _doctor_report, doctor

    report = doctor.examine(quiet=args.json)
    if args.json:
        print(json.dumps(doctor.as_json(report), indent=2))
    else:
        print("\n".join(_doctor_report.lines(report)))
    return 0 if report.ok else 1


def _add_integrations(subparsers: "argparse._SubParsersAction[_Parser]") -> None:
    job = subparsers.add_parser(
        "integrations",
        help="list the code bases that the operator can be put into",
        description=_INTEGRATIONS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    job.add_argument("--model", metavar="DIR", help="say what would be replaced in this checkpoint (or hub id)")
    job.add_argument("--json", action="store_true", help="print JSON instead of a table")
    job.set_defaults(run=_run_integrations)


def _run_integrations(args: argparse.Namespace) -> None:
    from visionkernels import _integrations_report
    from visionkernels.integrations import table

    if args.model is not None:
        from visionkernels.integrations.preview import would_patch

        report = would_patch(args.model)
        print(json.dumps(asdict(report), indent=2) if args.json else report.describe("would be replaced"))
    elif args.json:
        print(json.dumps([asdict(row) for row in table.rows()], indent=2))
    else:
        _integrations_report.show(table.rows())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; by default those of the process.

    Returns:
        The exit code: 0, 1 if `bench`, `doctor` or `export --check` found a wrong result, 2 for what the caller can put
        right (one line on stderr says what), 130 when interrupted.
    """
    try:
        args = build_parser().parse_args(argv)
        return args.run(args) or 0
    except UserError as error:
        print(f"visionkernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
