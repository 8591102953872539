"""What a checkpoint may be, and what is said about one that cannot be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from models.tiny_vits import CASES, FAMILY_CASES, outputs, relative_error, save, transformers
from safetensors.torch import load_file, save_file

from visionkernels.errors import UserError
from visionkernels.models import FAMILIES, ViT, ViTConfig
from visionkernels.models.families import DEFAULTS
from visionkernels.models.names import TABLES

PICTURES = torch.randn(2, 3, 32, 32)


def edit_weights(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def refusal(directory: Path, **options: object) -> str:
    with pytest.raises(UserError) as error:
        ViT.from_pretrained(directory, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_every_tensor_is_needed(name: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ignored = ("text_model.", "text_projection", "logit_", "embeddings.mask_token")
    needed = [tensor for tensor in tensors if not tensor.startswith(ignored)]
    assert len(needed) > 40
    for removed in [tensor for tensor in needed if ".1." not in tensor and ".2." not in tensor]:
        save_file({k: v for k, v in tensors.items() if k != removed}, tmp_path / "model.safetensors")
        assert refusal(tmp_path) == f"model: the checkpoint lacks: {removed}"


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_no_tensor_is_left_over(name: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({"encoder.extra.weight": torch.ones(2)}))
    message = refusal(tmp_path)
    assert "encoder.extra.weight" in message
    assert "has no place for" in message


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_every_shape_is_checked(name: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ignored = ("text_model.", "text_projection", "logit_", "embeddings.mask_token")
    for changed in [t for t in tensors if not t.startswith(ignored) and ".1." not in t and ".2." not in t]:
        wrong = torch.cat([tensors[changed], tensors[changed]], -1)
        save_file({**tensors, changed: wrong}, tmp_path / "model.safetensors")
        message = refusal(tmp_path)
        assert changed in message
        assert str(list(wrong.shape)) in message
        assert str(list(tensors[changed].shape)) in message


@pytest.mark.parametrize("name", [*CASES])
def test_second_generation_of_names(name: str, tmp_path: Path) -> None:
    """A file of the names that the model has in memory, in whichever version of transformers."""
    case = CASES[name]
    model = save(case, tmp_path)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    vit = ViT.from_pretrained(tmp_path)
    wanted = outputs(case, model, PICTURES)
    got = vit(PICTURES)
    for key, value in wanted.items():
        assert relative_error(getattr(got, key), value) <= 1e-5


def test_names_of_both_generations_are_told_apart(tmp_path: Path) -> None:
    """Of a file with names of the second generation, one of these is missing."""
    save(CASES["vit"], tmp_path)

    def rename(tensors: dict) -> None:
        for name in list(tensors):
            new = name.replace("encoder.layer.", "layers.").replace("attention.attention.", "attention.")
            new = new.replace("attention.output.dense", "attention.o_proj").replace("intermediate.dense", "mlp.fc1")
            new = new.replace("output.dense", "mlp.fc2")
            for short in ("query", "key", "value"):
                new = new.replace(f"attention.{short}", f"attention.{short[0]}_proj")
            tensors[new] = tensors.pop(name)

    edit_weights(tmp_path, rename)
    ViT.from_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop("layers.1.mlp.fc2.bias"))
    assert refusal(tmp_path) == "model: the checkpoint lacks: layers.1.mlp.fc2.bias"


@pytest.mark.parametrize("name", ["vit", "clip-full"])
def test_shards(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.build()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    wanted = outputs(case, model, PICTURES)["last_hidden_state"]
    assert relative_error(ViT.from_pretrained(tmp_path)(PICTURES).last_hidden_state, wanted) <= 1e-5
    shards[1].unlink()
    assert shards[1].name in refusal(tmp_path)


def test_poolers_may_be_left_out(tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path)
    edit_weights(tmp_path, lambda tensors: [tensors.pop(f"pooler.dense.{kind}") for kind in ("weight", "bias")])
    assert ViT.from_pretrained(tmp_path)(PICTURES).pooler_output is None


def test_known_buffers_are_ignored(tmp_path: Path) -> None:
    save(CASES["clip-full"], tmp_path)
    names = ["vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"]
    edit_weights(tmp_path, lambda tensors: tensors.update({name: torch.arange(3) for name in names}))
    ViT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "swin"}, ["'swin'", *FAMILIES]),
        ({"model_type": None, "architectures": ["SwinModel"]}, ["'SwinModel'", *FAMILIES]),
        ({"model_type": None, "architectures": None}, ["None", *FAMILIES]),
        ({"num_channels": 1}, ["3 channels", "1"]),
        ({"hidden_act": "relu"}, ["'relu'", "gelu"]),
        ({"patch_size": [8, 4]}, ["8 x 4"]),
        ({"num_attention_heads": 5}, ["48", "5"]),
        ({"num_hidden_layers": 4}, ["lacks", "encoder.layer.3.", "and 13 more"]),
        ({"num_hidden_layers": 2}, ["encoder.layer.2.", "and 13 more"]),
    ],
    ids=str,
)
def test_configs_that_cannot_be_used(changes: dict, words: list[str], tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path)
    edit_config(tmp_path, **changes)
    message = refusal(tmp_path)
    for word in words:
        assert word in message


def test_architecture_names_the_family_where_model_type_is_missing(tmp_path: Path) -> None:
    for name in FAMILY_CASES:
        save(CASES[name], tmp_path)
        edit_config(tmp_path, model_type=None)
        ViT.from_pretrained(tmp_path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    assert "no directory /nowhere/at-all" in refusal(Path("/nowhere/at-all"))
    assert "no config.json" in refusal(tmp_path)
    save(CASES["vit"], tmp_path)
    weights = tmp_path / "model.safetensors"
    assert "is a file" in refusal(weights)
    weights.write_bytes(b"\x00" * 20)
    assert "cannot be read" in refusal(tmp_path)
    weights.unlink()
    assert "has no weights" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "must hold an object" in refusal(tmp_path)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    model = save(CASES["vit"], tmp_path)
    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    vit = ViT.from_pretrained("someone/tiny-vit")
    assert vit.name == "someone/tiny-vit"
    assert {name for name, _ in asked} == {"someone/tiny-vit"}
    assert (
        relative_error(vit(PICTURES).last_hidden_state, outputs(CASES["vit"], model, PICTURES)["last_hidden_state"])
        <= 1e-5
    )

    def offline(name: str, file: str) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert "hub cannot be reached" in refusal("someone/tiny-vit")
    assert "no directory" in refusal("a/b/c")


def test_needs_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(CASES["vit"], tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert "safetensors" in refusal(tmp_path)


def test_dtype_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    assert ViT.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert ViT.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert "torch.int8" in refusal(tmp_path, dtype=torch.int8)
    edit_config(tmp_path, dtype=None, torch_dtype="float16")  # the older name
    assert ViT.from_pretrained(tmp_path).dtype == torch.float16
    edit_config(tmp_path, dtype=None, torch_dtype=None)
    assert ViT.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_image_size_is_checked(tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path)
    assert ViT.from_pretrained(tmp_path, image_size=64).image_size == (64, 64)
    assert ViT.from_pretrained(tmp_path, image_size=(16, 64)).image_size == (16, 64)
    with pytest.raises(ValueError, match="multiples of the patch size 8, got 30 x 30"):
        ViT.from_pretrained(tmp_path, image_size=30)


CONFIGS = {
    "vit": "ViTConfig",
    "deit": "DeiTConfig",
    "dinov2": "Dinov2Config",
    "dinov2_with_registers": "Dinov2WithRegistersConfig",
    "dinov3": "DINOv3ViTConfig",
    "clip": "CLIPVisionConfig",
    "siglip": "SiglipVisionConfig",
    "beit": "BeitConfig",
}


@pytest.mark.parametrize("family", CONFIGS)
def test_defaults_are_those_of_transformers(family: str) -> None:
    config = getattr(transformers, CONFIGS[family])()
    for name, value in DEFAULTS[family].items():
        if name == "intermediate_size" and not hasattr(config, name):
            continue
        assert getattr(config, name) == value, name
    full = {**config.to_dict(), "architectures": None}
    sparse = {"model_type": full["model_type"]}
    assert ViTConfig.from_dict(full) == ViTConfig.from_dict(sparse)


def test_a_table_for_every_family() -> None:
    assert TABLES.keys() == DEFAULTS.keys() == set(FAMILIES.values())


def test_labels(tmp_path: Path) -> None:
    save(CASES["vit-classifier"], tmp_path)
    edit_config(tmp_path, id2label={"1": "b", "0": "a", "10": "k", "2": "c", "3": "d"})
    assert ViT.from_pretrained(tmp_path).config.labels == ("a", "b", "c", "d", "k")
    edit_config(tmp_path, id2label={"0": "a"})
    assert "classifier.bias" in refusal(tmp_path) or "classifier.weight" in refusal(tmp_path)
