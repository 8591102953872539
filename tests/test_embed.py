"""`vk.embed` and `vk.classify`: what a picture's vector and labels are, and what is said about wrong arguments."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models.tiny_vits import CASES, outputs, save, transformers
from PIL import Image

import visionkernels as vk
from visionkernels.embedding import embeddings
from visionkernels.errors import UserError

PROCESSORS = {
    "vit": "ViTImageProcessorPil",
    "vit-classifier": "ViTImageProcessorPil",
    "deit-distilled": "DeiTImageProcessorPil",
    "dinov2": "BitImageProcessorPil",
    "clip-full": "CLIPImageProcessorPil",
    "siglip": "SiglipImageProcessorPil",
    "siglip-classifier": "SiglipImageProcessorPil",
    "beit-classifier": "BeitImageProcessorPil",
    "vit-masked": "ViTImageProcessorPil",
}
VECTORS = {
    "vit": "pooler_output",
    "dinov2": "pooler_output",
    "siglip": "pooler_output",
    "clip-full": "image_embeds",
    "vit-masked": "last_hidden_state",
}


def checkpoint(name: str, directory: Path) -> tuple[torch.nn.Module, object]:
    model = save(CASES[name], directory)
    cls = getattr(transformers, PROCESSORS[name])
    cropped = name in ("dinov2", "clip-full", "deit-distilled")
    size = {"shortest_edge": 40} if name in ("dinov2", "clip-full") else {"height": 32, "width": 32}
    crop = {"crop_size": {"height": 32, "width": 32}} if cropped else {}
    processor = cls(size=size, **crop)
    processor.save_pretrained(directory)
    return model, processor


def picture(seed: int = 0, size: tuple[int, int] = (60, 50)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_checkpoint_s_own_size_that_its_patch_does_not_divide(tmp_path: Path) -> None:
    model = save(CASES["siglip"], tmp_path, patch_size=8, image_size=34)
    processor = transformers.SiglipImageProcessorPil(size={"height": 34, "width": 34})
    processor.save_pretrained(tmp_path)
    wanted = model(processor(images=picture(), return_tensors="pt").pixel_values).pooler_output[0].detach().numpy()
    got = vk.embed(picture(), tmp_path, device="cpu")
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    processor.size = {"height": 36, "width": 36}
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="36 x 36 pixels, which are no multiples of the patch size 8"):
        vk.embed(picture(), tmp_path, device="cpu")


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, processor = checkpoint(name, tmp_path)
    pixels = processor(images=picture(), return_tensors="pt").pixel_values
    wanted = outputs(CASES[name], model, pixels)[VECTORS[name]]
    wanted = (wanted[:, 0] if wanted.dim() == 3 else wanted)[0].numpy()
    got = vk.embed(picture(), tmp_path, device="cpu")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    unit = vk.embed(picture(), tmp_path, device="cpu", normalize=True)
    np.testing.assert_allclose(unit, wanted / np.linalg.norm(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit-classifier", "deit-distilled", "siglip-classifier", "beit-classifier"])
def test_labels_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, processor = checkpoint(name, tmp_path)
    pixels = processor(images=picture(), return_tensors="pt").pixel_values
    scores = outputs(CASES[name], model, pixels)["logits"].softmax(1)[0]
    got = vk.classify(picture(), tmp_path, top_k=9, device="cpu")
    order = scores.argsort(descending=True).tolist()
    assert [one["label"] for one in got] == [f"LABEL_{i}" for i in order]
    np.testing.assert_allclose([one["score"] for one in got], scores[order], rtol=1e-4)
    assert vk.classify(picture(), tmp_path, top_k=2, device="cpu") == got[:2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"problem_type": "single_label_classification"},
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression"},
        {"num_labels": 1},
        {"num_labels": 1, "problem_type": "regression"},
    ],
    ids=str,
)
def test_scores_are_those_of_the_pipeline(changes: dict, tmp_path: Path) -> None:
    case = CASES["vit-classifier"]
    _, processor = checkpoint("vit-classifier", tmp_path)
    model = save(replace(case, changes=case.changes | changes), tmp_path)
    pipeline = transformers.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    wanted = pipeline(picture(), top_k=3)
    got = vk.classify(picture(), tmp_path, top_k=3, device="cpu")
    assert [one["label"] for one in got] == [one["label"] for one in wanted]
    np.testing.assert_allclose([one["score"] for one in got], [one["score"] for one in wanted], rtol=1e-4)


@pytest.mark.parametrize(("dtype", "words"), [(torch.float32, "damaged"), (torch.float16, "--dtype fp32")], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers(number: float, dtype: torch.dtype, words: str, tmp_path: Path) -> None:
    checkpoint("vit-classifier", tmp_path)
    vit = vk.ViT.from_pretrained(tmp_path, dtype=dtype)
    vit.norm.bias.fill_(number)
    vit.heads.classifier.bias[1] = number
    for job in (vk.embed, vk.classify):
        with pytest.raises(UserError, match=f"gives NaN or infinity in {dtype} on cpu; .*{words}"):
            job(picture(), vit)


def test_lists_and_batches(tmp_path: Path) -> None:
    checkpoint("vit", tmp_path)
    vit = vk.ViT.from_pretrained(tmp_path)
    pictures = [picture(seed) for seed in range(5)]
    together = vk.embed(pictures, vit, batch_size=2)
    assert together.shape == (5, 48)
    for one, vector in zip(pictures, together, strict=True):
        np.testing.assert_allclose(vk.embed(one, vit), vector, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01
    assert vk.embed(tuple(pictures[:1]), vit).shape == (1, 48)
    assert [len(batch) for batch in embeddings(vit, pictures, 2)] == [2, 2, 1]


def test_kinds_of_images(tmp_path: Path) -> None:
    checkpoint("vit", tmp_path)
    vit, path = vk.ViT.from_pretrained(tmp_path), tmp_path / "picture.png"
    picture().save(path)
    wanted = vk.embed(picture(), vit)
    for image in (path, str(path), np.asarray(picture()), torch.from_numpy(np.array(picture()))):
        np.testing.assert_array_equal(vk.embed(image, vit), wanted)


def test_pictures_of_different_sizes_run_apart(tmp_path: Path) -> None:
    """A processor that keeps proportions."""
    checkpoint("dinov2", tmp_path)
    processor = transformers.BitImageProcessorPil(do_resize=False, do_center_crop=False)
    processor.save_pretrained(tmp_path)
    vit = vk.ViT.from_pretrained(tmp_path)
    pictures = [picture(0, (32, 32)), picture(1, (32, 32)), picture(2, (64, 16))]
    together = vk.embed(pictures, vit)
    for one, vector in zip(pictures, together, strict=True):
        np.testing.assert_allclose(vk.embed(one, vit), vector, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip-full"])
def test_another_image_size(name: str, tmp_path: Path) -> None:
    _, processor = checkpoint(name, tmp_path)
    vit = vk.ViT.from_pretrained(tmp_path, image_size=(48, 64))
    if name == "vit":
        options = {"size": {"height": 48, "width": 64}}
    else:
        options = {"size": {"shortest_edge": 80}, "crop_size": {"height": 48, "width": 64}}
    pixels = processor(images=picture(), return_tensors="pt", **options).pixel_values
    assert pixels.shape[2:] == (48, 64)
    output = vit(pixels)
    wanted = output.pooler_output if output.image_embeds is None else output.image_embeds
    np.testing.assert_allclose(vk.embed(picture(), vit), wanted[0].numpy(), atol=1e-5)


def test_dinov3_needs_no_torchvision(tmp_path: Path) -> None:
    save(CASES["dinov3"], tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 32, "width": 32}, "resample": 2,'
        ' "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_normalize": true}'
    )
    vit = vk.ViT.from_pretrained(tmp_path)
    pixels = torch.from_numpy(np.array(picture().resize((32, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    wanted = vit(pixels[None].contiguous()).pooler_output[0].numpy()
    np.testing.assert_allclose(vk.embed(picture(), vit), wanted, atol=1e-4)


def test_a_model_of_16_bits_gives_vectors_of_32(tmp_path: Path) -> None:
    checkpoint("vit", tmp_path)
    vector = vk.embed(picture(), tmp_path, device="cpu", dtype=torch.bfloat16)
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, vk.embed(picture(), tmp_path, device="cpu"), atol=0.1)


@pytest.mark.parametrize("job", [vk.embed, vk.classify])
def test_wrong_arguments(job, tmp_path: Path) -> None:
    checkpoint("vit-classifier", tmp_path)
    vit = vk.ViT.from_pretrained(tmp_path)

    def refusal(*arguments: object, **options: object) -> str:
        with pytest.raises(UserError) as error:
            job(*arguments, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no file" in refusal(tmp_path / "none.png", vit)
    assert "list is empty" in refusal([], vit)
    assert "batch_size" in refusal(picture(), vit, batch_size=0)
    assert "leave it out" in refusal(picture(), vit, dtype=torch.float16)
    assert "no directory" in refusal(picture(), "/nowhere")
    assert "expected cpu, cuda" in refusal(picture(), tmp_path, device="tpu")
    config = vit.config
    assert "not from a checkpoint" in refusal(picture(), vk.ViT(config))
    (tmp_path / "preprocessor_config.json").unlink()
    assert "image processor" in refusal(picture(), tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": {"height": 33, "width": 32}}, "33 x 32 pixels, which are no multiples of the patch size 8"),
        ({"do_resize": False}, "50 x 60 pixels, which are no multiples of the patch size 8"),
        ({"size": {"height": -8, "width": 32}}, "the image processor of .* fails: "),
        ({"size": {"height": "32", "width": 32}}, "the image processor of .* fails: "),
        ({"resample": 77}, "the image processor of .* fails: "),
        ({"image_mean": None}, "the image processor of .* fails: "),
        ({"image_processor_type": 5}, "image_processor_type: expected a string"),
        ({"size": "big"}, "the image processor of .* cannot be loaded"),
    ],
    ids=str,
)
def test_image_processors_that_cannot_be_used(settings: dict, words: str, tmp_path: Path) -> None:
    checkpoint("vit", tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError, match=words) as error:
        vk.embed(picture(), tmp_path, device="cpu")
    assert "\n" not in str(error.value)


def test_an_image_processor_that_leaves_bytes(tmp_path: Path) -> None:
    model, _ = checkpoint("vit", tmp_path)
    size = {"height": 32, "width": 32}
    processor = transformers.ViTImageProcessorPil(size=size, do_rescale=False, do_normalize=False)
    processor.save_pretrained(tmp_path)
    pixels = processor(images=picture(), return_tensors="pt").pixel_values
    assert pixels.dtype == torch.uint8
    wanted = outputs(CASES["vit"], model, pixels.float())["pooler_output"][0].numpy()
    np.testing.assert_allclose(vk.embed(picture(), tmp_path, device="cpu"), wanted, atol=1e-5)


def test_what_does_not_classify(tmp_path: Path) -> None:
    checkpoint("vit", tmp_path)
    with pytest.raises(UserError, match="is no classifier"):
        vk.classify(picture(), tmp_path, device="cpu")
    checkpoint("vit-classifier", tmp_path)
    with pytest.raises(UserError, match="top_k: expected a whole number of at least 1, but it is 0"):
        vk.classify(picture(), tmp_path, top_k=0)
