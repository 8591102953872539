"""`visionkernels embed` and `classify`: tables, JSON, files, and one line and exit code 2 for every mistake."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_embed import checkpoint, picture

import visionkernels as vk
from visionkernels.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("vit")
    checkpoint("vit", directory)
    return str(directory)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("classifier")
    checkpoint("vit-classifier", directory)
    return str(directory)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"picture{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        picture(seed).save(path)
    return [str(path) for path in paths]


def fails_with(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run the command; return the one line that it leaves on stderr."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("visionkernels: error: ")
    assert err.count("\n") == 1
    return err


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_npy(capsys, pictures, model, tmp_path):
    output = tmp_path / "vectors.npy"
    out = run(capsys, "embed", *pictures, "--model", model, "--output", str(output), "--batch-size", "2")
    wanted = vk.embed(pictures, model, device="cpu")
    np.testing.assert_allclose(np.load(output), wanted, atol=1e-5)
    assert np.load(output).dtype == np.float32
    for path, vector in zip(pictures, wanted, strict=True):
        assert Path(path).name in out
        assert f"{vector[0]:.3f}" in out
    assert f"written to {output}" in out
    assert "ran in float32 on the CPU" in out


def test_parquet(capsys, pictures, model, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "vectors.parquet"
    run(capsys, "embed", *pictures, "--model", model, "--output", str(output), "--normalize")
    table = parquet.read_table(output)
    assert table["image"].to_pylist() == pictures
    wanted = vk.embed(pictures, model, device="cpu", normalize=True)
    np.testing.assert_allclose(table["embedding"].to_pylist(), wanted, atol=1e-5)


def test_parquet_needs_pyarrow(capsys, pictures, model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else find(name, *rest)
    )
    err = fails_with(capsys, "embed", *pictures, "--model", model, "--output", str(tmp_path / "vectors.parquet"))
    assert "pip install 'visionkernels[parquet]'" in err


def test_vectors_as_json(pictures, model):
    """In a process of its own, so that nothing is hidden by capturing."""
    command = [sys.executable, "-m", "visionkernels", "embed", *pictures, "--model", model, "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["dimensions"] == 48
    assert [one["image"] for one in report["images"]] == pictures
    wanted = vk.embed(pictures, model, device="cpu")
    np.testing.assert_allclose([one["embedding"] for one in report["images"]], wanted, atol=1e-5)


def test_labels(capsys, pictures, classifier):
    out = run(capsys, "classify", *pictures, "--model", classifier, "--top-k", "2")
    wanted = vk.classify(pictures, classifier, top_k=2, device="cpu")
    for path, labels in zip(pictures, wanted, strict=True):
        assert Path(path).name in out
        for one in labels:
            assert any(one["label"] in line and f"{one['score']:.3f}" in line for line in out.splitlines())
    report = json.loads(run(capsys, "classify", *pictures, "--model", classifier, "--top-k", "2", "--json"))
    assert [one["labels"] for one in report["images"]] == wanted


def test_dtype(capsys, pictures, model):
    report = json.loads(run(capsys, "embed", pictures[0], "--model", model, "--dtype", "bf16", "--json"))
    assert report["dtype"] == "bfloat16"


def test_help_has_examples(capsys):
    for job in ("embed", "classify"):
        with pytest.raises(SystemExit) as done:
            main([job, "--help"])
        assert done.value.code == 0
        out = capsys.readouterr().out
        assert "examples:" in out
        assert f"visionkernels {job} " in out


@pytest.mark.parametrize("job", ["embed", "classify"])
def test_mistakes_of_both(capsys, job, pictures, classifier, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    ok = [job, pictures[0], "--model", classifier]
    assert "--model" in fails_with(capsys, job, pictures[0])
    assert "IMAGE" in fails_with(capsys, job, "--model", classifier)
    assert "none.png is no file" in fails_with(capsys, job, pictures[0], "none.png", "--model", classifier)
    assert "is a directory" in fails_with(capsys, job, str(tmp_path), "--model", classifier)
    assert "no image that Pillow can read" in fails_with(capsys, job, str(text), "--model", classifier)
    assert "no image that Pillow can read" in fails_with(
        capsys, job, pictures[0], str(text), "--model", classifier, "--device", "cpu"
    )
    assert "there is no directory ./none" in fails_with(capsys, job, pictures[0], "--model", "./none")
    assert "--batch-size" in fails_with(capsys, *ok, "--batch-size", "0")
    assert "--batch-size" in fails_with(capsys, *ok, "--batch-size", "many")
    assert "--dtype: expected one of fp32, fp16, bf16, but it is 'int8'" in fails_with(capsys, *ok, "--dtype", "int8")
    assert "device" in fails_with(capsys, *ok, "--device", "tpu")


def test_names_are_no_markup(capsys, tmp_path):
    checkpoint("vit-classifier", tmp_path)
    path = tmp_path / "config.json"
    labels = ["[/b]", "[red]x", ":smile:", "d", "e"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": dict(enumerate(labels))}))
    image = tmp_path / "a[b].png"
    picture().save(image)
    capsys.readouterr()  # the progress of saving
    assert "a[b].png" in run(capsys, "embed", str(image), "--model", str(tmp_path))
    out = run(capsys, "classify", str(image), "--model", str(tmp_path))
    for word in ("a[b].png", *labels):
        assert f" {word} " in out


PICTURES = {  # what a picture is saved as, and how
    "cmyk.jpg": lambda image: image.convert("CMYK"),
    "rgba.png": lambda image: image.convert("RGBA"),
    "bits.png": lambda image: image.convert("1"),
    "palette.png": lambda image: image.convert("P"),
    "grey16.png": lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257),
    "one.png": lambda image: image.resize((1, 1)),
    "wide.png": lambda image: image.resize((20000, 10)),
    "thin.png": lambda image: image.resize((1, 3000)),
}


def test_pictures_of_every_kind(capsys, model, tmp_path):
    paths = [str(tmp_path / name) for name in (*PICTURES, "moves.gif", "turned.jpg")]
    for path, convert in zip(paths, PICTURES.values(), strict=False):
        convert(picture()).save(path)
    picture().save(paths[-2], save_all=True, append_images=[picture(1)])
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees
    picture().save(paths[-1], exif=exif, quality=100)
    report = json.loads(run(capsys, "embed", *paths, "--model", model, "--json"))
    vectors = dict(
        zip((Path(path).name for path in paths), (one["embedding"] for one in report["images"]), strict=True)
    )
    turned = Image.open(paths[-1]).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    first = Image.open(paths[-2]).convert("RGB")
    for name, image in (("turned.jpg", turned), ("moves.gif", first), ("rgba.png", picture())):
        np.testing.assert_allclose(vectors[name], vk.embed(np.array(image), model, device="cpu"), atol=1e-5)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_pictures_that_cannot_be_read(capsys, model, tmp_path):
    names = ("floats.tif", "wide.tif", "cut.png", "exif.png", "empty.png")
    floats, wide, cut, exif, empty = paths = [str(tmp_path / name) for name in names]
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(floats)
    Image.fromarray(np.full((8, 8), 10**9, dtype=np.int32)).save(wide)
    picture().save(cut)
    Path(cut).write_bytes(Path(cut).read_bytes()[:2000])
    picture().save(exif, exif=b"Exif\0\0no such thing")
    Path(empty).write_bytes(b"")
    good = str(tmp_path / "good.png")
    picture().save(good)
    for path in paths:
        for images in ([path], [good, path]):
            assert path in fails_with(capsys, "embed", *images, "--model", model, "--device", "cpu")


@pytest.mark.parametrize("job", ["embed", "classify"])
def test_no_json_has_nan(capsys, job, pictures, tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoint("vit-classifier", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vit.embeddings.position_embeddings"].fill_(torch.nan)
    save_file(tensors, tmp_path / "model.safetensors")
    capsys.readouterr()  # the progress of saving
    output = ["--output", str(tmp_path / "vectors.npy")] if job == "embed" else []
    for options in (["--json"], output):
        arguments = [job, *pictures, "--model", str(tmp_path), "--device", "cpu", *options]
        assert "gives NaN or infinity" in fails_with(capsys, *arguments)
    assert not (tmp_path / "vectors.npy").exists()


def test_mistakes_of_embed(capsys, pictures, model, tmp_path):
    ok = ["embed", pictures[0], "--model", model, "--output"]
    assert "neither .npy nor .parquet" in fails_with(capsys, *ok, "vectors.csv")
    assert "no directory" in fails_with(capsys, *ok, str(tmp_path / "none" / "vectors.npy"))
    (tmp_path / "directory.npy").mkdir()
    assert "is a directory" in fails_with(capsys, *ok, str(tmp_path / "directory.npy"))


def test_mistakes_of_classify(capsys, pictures, model, classifier):
    assert "is no classifier" in fails_with(capsys, "classify", pictures[0], "--model", model, "--device", "cpu")
    assert "--top-k" in fails_with(capsys, "classify", pictures[0], "--model", classifier, "--top-k", "0")
