"""`visionkernels export`: its report, its check, and one line with exit code 2 for every mistake."""

import json

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

from models import tiny_vits
from tiny_detectors import save_yolos

from visionkernels.cli import main
from visionkernels.export import _standard


def fails_with(capsys, *argv: str) -> str:
    """Run the command; return the one line that it leaves on stderr."""
    assert main(["export", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("visionkernels: error: ")
    assert err.count("\n") == 1
    return err


def test_it_writes_checks_and_reports(capsys, tmp_path):
    path = tmp_path / "op.onnx"
    argv = [
        "export",
        "ms_deform_attn",
        "--format",
        "onnx",
        "--dynamic",
        "batch, queries",
        "--output",
        str(path),
        "--check",
    ]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"wrote {path}: ms_deform_attn" in out
    assert "operators of visionkernels: 1" in out
    assert "input  locations [batch, queries, 4, 3, 3, 2]" in out
    assert out.count("random") == 2
    assert "ok" in out
    assert "WRONG" not in out


def test_a_wrong_artefact_is_exit_code_1(capsys, tmp_path, monkeypatch):
    right = _standard.ms_deform_attn
    wrong = {key: lambda *a: right(*a) * 1.001 for key in _standard.lowered()}
    monkeypatch.setattr(_standard, "lowered", lambda opset: wrong)
    path = str(tmp_path / "op.onnx")
    assert main(["export", "ms_deform_attn", "--format", "onnx", "--output", path, "--check"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_float16(capsys, tmp_path):
    path = str(tmp_path / "op.onnx")
    argv = [
        "export",
        "MSDeformAttn",
        "--format",
        "tensorrt",
        "--plugin-version",
        "1",
        "--dtype",
        "fp16",
        "--output",
        path,
    ]
    assert main(argv) == 0
    assert "version 1 of MultiscaleDeformableAttnPlugin_TRT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ms_deform_attn"], "the following arguments are required: --format"),
        (
            ["ms_deform_attn", "--format", "tflite"],
            "--format: expected one of onnx, tensorrt, aoti, but it is 'tflite'",
        ),
        (
            ["ms_deform_attn", "--format", "onnx", "--opset", "11"],
            "opset: expected 16 to 23, but it is 11; 18 suits most",
        ),
        (["ms_deform_attn", "--format", "tensorrt", "--opset", "21"], "use 19 or less"),
        (["ms_deform_attn", "--format", "onnx", "--dynamic", "depth"], "has no size 'depth'; choose of batch, queries"),
        (["ms_deform_attn", "--format", "onnx", "--dtype", "int8"], "--dtype: expected one of fp32, fp16"),
        (["ms_deform_attn", "--format", "onnx", "--keep-operators"], "only --format aoti can keep the operators"),
        (["ms_deform_attn", "--format", "onnx", "--output", "nowhere/op.onnx"], "there is no directory nowhere"),
        (["ViT", "--format", "onnx", "--dynamic", "depth"], "ViT has no size 'depth'; choose of batch, height, width"),
        (["ViT", "--format", "onnx", "--device", "cuda"], "--device: an ONNX file is for every device; only --format"),
        (
            ["ViT", "--format", "aoti", "--device", "tpu"],
            "--device: expected cpu, cuda or cuda:<index>, but it is 'tpu'",
        ),
        (["ms_deform_attn", "--format", "aoti", "--output", "op.so"], "must end in .pt2, and it is op.so"),
        (["./nowhere", "--format", "onnx"], "there is no directory ./nowhere"),
    ],
)
def test_a_mistake_is_one_line(capsys, argv, message):
    assert message in fails_with(capsys, *argv)


def test_a_model_without_the_operators(capsys, tmp_path):
    torch.manual_seed(0)
    folder = str(save_yolos(tmp_path / "yolos"))
    assert "nothing to patch in YolosForObjectDetection" in fails_with(capsys, folder, "--format", "onnx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert "device: cuda is not there: torch sees no GPU" in fails_with(
        capsys, "ViT", "--format", "aoti", "--device", "cuda"
    )


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"model_type": "convnexty"}, "'convnexty'"), ({"architectures": ["X"]}, "None"), ({}, "None")],
)
def test_an_unknown_model_type(capsys, tmp_path, settings, name):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    error = fails_with(capsys, str(tmp_path), "--format", "onnx")
    assert f"names the model_type {name}, which transformers " in error
    assert "is exported from Python: visionkernels.export.onnx.export(model, inputs, path)" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": ["vit"]}, "config.json: model_type: expected a string, but it is ['vit']"),
        ({"architectures": "ViTModel"}, "config.json: architectures: expected a list of strings"),
    ],
)
def test_a_model_type_that_is_none(capsys, tmp_path, settings, message):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert message in fails_with(capsys, str(tmp_path), "--format", "onnx")


@pytest.mark.parametrize("left", [{}, {"model_type": None}], ids=["left out", "null"])
def test_a_vit_whose_architecture_names_it(capsys, tmp_path, left):
    tiny_vits.save(tiny_vits.CASES["vit"], tmp_path / "some", num_hidden_layers=1)
    config = tmp_path / "some" / "config.json"
    settings = json.loads(config.read_text())
    del settings["model_type"]
    config.write_text(json.dumps(settings | left))
    capsys.readouterr()
    assert main(["export", str(tmp_path / "some"), "--format", "onnx", "--output", str(tmp_path / "some.onnx")]) == 0
    assert "some in" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["onnx", "tensorrt"])
def test_a_checkpoint_of_a_vit(capsys, tmp_path, kind):
    tiny_vits.save(tiny_vits.CASES["clip-full"], tmp_path / "clip", num_hidden_layers=1)
    path = tmp_path / "clip.onnx"
    argv = ["export", str(tmp_path / "clip"), "--format", kind, "--dynamic", "batch", "--output", str(path), "--check"]
    capsys.readouterr()
    assert main(argv if kind == "onnx" else [*argv, "--dtype", "fp16"]) == 0
    out, _ = capsys.readouterr()
    assert "clip in" in out
    assert ("no plugin is needed" in out) is (kind == "tensorrt")
    assert "input  pixel_values [batch, 3, 32, 32]" in out
    assert all(f"output {name}" in out for name in ("last_hidden_state", "pooler_output", "image_embeds"))
    assert out.count("sample picture") == 3
    assert "WRONG" not in out


def test_a_model_that_takes_text(capsys, tmp_path):
    from transformers import GroundingDinoConfig

    GroundingDinoConfig().save_pretrained(tmp_path)
    error = fails_with(capsys, str(tmp_path), "--format", "onnx")
    assert "a grounding-dino takes a text beside the image; export it from Python" in error


def test_the_help_says_why_opset_18(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "which TensorRT takes for nearest" in " ".join(capsys.readouterr().out.split())
