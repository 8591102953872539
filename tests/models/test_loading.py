"""What a checkpoint may be, and what is said about one that cannot be used."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models.tiny_vits import CASES, FAMILY_CASES, outputs, relative_error, save, transformers
from safetensors.torch import load_file, save_file

from visionkernels._devices import find_device
from visionkernels.errors import UserError
from visionkernels.models import FAMILIES, ViT, ViTConfig
from visionkernels.models.families import DEFAULTS
from visionkernels.models.kinds import CONFIG, PREPROCESSOR, VISION_CONFIG
from visionkernels.models.names import TABLES
from visionkernels.ops._common import shown

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
    message = refusal(tmp_path, dtype="float16")
    assert message.startswith("dtype: expected one of torch.float32, torch.float16")
    assert message.endswith("but it is 'float16'")
    edit_config(tmp_path, dtype=None, torch_dtype="float16")  # the older name
    assert ViT.from_pretrained(tmp_path).dtype == torch.float16
    edit_config(tmp_path, dtype=None, torch_dtype=None)
    assert ViT.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_image_size_is_checked(tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path)
    assert ViT.from_pretrained(tmp_path, image_size=64).image_size == (64, 64)
    assert ViT.from_pretrained(tmp_path, image_size=(16, 64)).image_size == (16, 64)
    for size in np.int64(64), (np.int32(64), 64), [64, np.uint8(64)]:
        found = ViT.from_pretrained(tmp_path, image_size=size).image_size
        assert found == (64, 64)
        assert all(type(side) is int for side in found)
    with pytest.raises(ValueError, match="multiples of the patch size 8, got 30 x 30"):
        ViT.from_pretrained(tmp_path, image_size=30)
    for size in ("224", (32,), 32.0, True, 0, -32, (32, "32"), [32], torch.tensor(32), np.True_, np.float32(32)):
        message = refusal(tmp_path, image_size=size)
        assert message.startswith("image_size: expected a whole number from 1 to 65536, or [height, width] of such, ")
        assert message.endswith(f"but it is {shown(size)}")


def test_devices_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(CASES["vit"], tmp_path)
    for device in ("nonsense", "mps", "", "cuda:x", 3.5):
        message = refusal(tmp_path, device=device)
        assert message == f"device: expected cpu, cuda or cuda:<index>, but it is {str(device)!r}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(tmp_path, device="cuda") == "device: cuda is not there: torch sees no GPU; use the CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refusal(tmp_path, device="cuda:7") == "device: cuda:7 is not there: torch sees 2 GPUs"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert find_device("cuda") == torch.device("cuda", 1)


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


@pytest.mark.parametrize("whole", [np.int64, np.int32, np.uint16])
def test_a_config_of_integers_of_numpy(whole: type) -> None:
    numbers = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64, "patch_size": 8}
    config = ViTConfig("vit", **{name: whole(number) for name, number in numbers.items()}, image_size=(whole(32),) * 2)
    assert config == ViTConfig("vit", **numbers, image_size=(32, 32))
    assert type(config.num_layers) is type(config.image_size[0]) is int
    assert ViT(config)(PICTURES).last_hidden_state.shape == (2, 17, 32)
    for wrong in True, np.True_, np.float64(2), whole(0), np.array([2]):
        with pytest.raises(UserError, match="config: num_heads: expected a whole number from 1 to 65536, but it is"):
            ViTConfig("vit", num_heads=wrong)


def test_labels(tmp_path: Path) -> None:
    save(CASES["vit-classifier"], tmp_path)
    edit_config(tmp_path, id2label={"1": "b", "0": "a", "10": "k", "2": "c", "3": "d"})
    assert ViT.from_pretrained(tmp_path).config.labels == ("a", "b", "c", "d", "k")
    edit_config(tmp_path, id2label={"0": "a"})
    assert "classifier.bias" in refusal(tmp_path) or "classifier.weight" in refusal(tmp_path)


WRONG = [  # key, value, what was expected
    ("num_attention_heads", 0, "a whole number from 1 to"),
    ("num_attention_heads", True, "a whole number from 1 to"),
    ("hidden_size", "768", "a whole number from 1 to"),
    ("hidden_size", 768.0, "a whole number from 1 to"),
    ("hidden_size", 10**40, "a whole number from 1 to"),
    ("hidden_size", None, "a whole number from 1 to"),
    ("intermediate_size", -1, "a whole number from 1 to"),
    ("num_hidden_layers", -2, "a whole number from 1 to"),
    ("layer_norm_eps", "1e-6", "a number from 0 to 1"),
    ("layer_norm_eps", math.nan, "a number from 0 to 1"),
    ("image_size", 0, "a whole number from 1 to 65536, or [height, width] of such"),
    ("image_size", [32, 32, 32], "a whole number from 1 to 65536, or [height, width] of such"),
    ("patch_size", [8, "8"], "a whole number from 1 to 65536, or [height, width] of such"),
    ("hidden_act", ["gelu"], "a string"),
    ("qkv_bias", "yes", "true or false"),
    ("model_type", ["vit"], "a string"),
    ("architectures", "ViTModel", "a list of strings"),
    ("id2label", ["cat", "dog"], "an object of names by their numbers"),
    ("id2label", {"cat": 0}, "an object of names by their numbers"),
    ("num_labels", "2", "a whole number from 0 to"),
    ("problem_type", "guessing", "one of single_label_classification, "),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG, ids=lambda x: str(x)[:20])
def test_values_of_a_wrong_kind(key: str, value: object, expected: str, tmp_path: Path) -> None:
    save(CASES["vit-classifier"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    message = refusal(tmp_path)
    assert message.startswith(f"model: config.json: {key}: expected {expected}")
    assert message.endswith(f", but it is {value!r}")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("vit", {"hidden_size": 2**16, "num_attention_heads": 1}, "config.json makes it"),  # allocates nothing
        ("vit", {"image_size": 4}, "image_size 4 x 4 is less than one patch of 8"),
        ("dinov2", {"mlp_ratio": 0.01}, "mlp_ratio 0.01 leaves the MLP no channels"),
        ("dinov2", {"mlp_ratio": math.inf}, "mlp_ratio: expected a number"),
        ("dinov3", {"num_attention_heads": 8}, "heads of 4, 8, ... channels, but they have 6"),
        ("clip-full", {"vision_config": [1]}, "vision_config: expected an object"),
        ("clip-full", {"vision_config": {"hidden_size": 0}}, "hidden_size: expected a whole number"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_together(name: str, changes: dict, words: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path)
    edit_config(tmp_path, **changes)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rescale_factor": None}, "rescale_factor: expected a number from 0 to 1e+06, but it is None"),
        ({"rescale_factor": "1/255"}, "rescale_factor: expected a number"),
        (
            {"image_mean": [0.5]},
            "image_mean: expected a number from -1e+06 to 1e+06, or a list of three of such, but it is [0.5]",
        ),
        ({"image_std": [0.5, 0.5, 0]}, "image_std: expected a number from 1e-06 to 1e+06, or a list of three of such"),
        ({"image_std": 0}, "image_std: expected a number from 1e-06 to 1e+06, or a list of three of such, but it is 0"),
        ({"image_mean": True}, "image_mean: expected a number"),
        ({"do_normalize": "no"}, "do_normalize: expected true or false, but it is 'no'"),
        ([], "must hold an object"),
    ],
    ids=str,
)
def test_preprocessors_that_cannot_be_used(settings: object, words: str, tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(settings))
    assert words in refusal(tmp_path)
    assert "preprocessor_config.json" in refusal(tmp_path)
    path.rename(tmp_path / "processor_config.json")
    if isinstance(settings, dict):
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert words in refusal(tmp_path)
    assert " processor_config.json" in refusal(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": [settings]}))
    assert "image_processor: expected an object" in refusal(tmp_path)


def test_one_number_normalises_every_channel(tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path)
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": 0, "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    vit = ViT.from_pretrained(tmp_path)
    assert (vit.pixel_mean, vit.pixel_std) == ((0.0, 0.0, 0.0), (0.2, 0.3, 0.4))
    settings |= {"image_mean": 0.25, "image_std": 0.5, "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    vit = ViT.from_pretrained(tmp_path)
    assert (vit.pixel_mean, vit.pixel_std) == ((0.25,) * 3, (0.5,) * 3)
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    processor = transformers.ViTImageProcessorPil.from_pretrained(tmp_path)
    theirs = vit(processor(pixels.permute(1, 2, 0).numpy(), return_tensors="pt").pixel_values).last_hidden_state
    assert relative_error(vit(pixels[None]).last_hidden_state, theirs) <= 1e-5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe{}", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"hidden_size": ' + b"1" * 5000 + b"}", "cannot be read"),
        (b"3", "must hold an object"),
    ],
    ids=lambda text: str(text)[:12],
)
def test_a_config_that_is_no_json(text: bytes, words: str, tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    assert words in refusal(tmp_path)
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}, "model.safetensors"], ids=str)
def test_indices_that_cannot_be_used(weight_map: object, tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json: weight_map: expected an object of file names" in refusal(tmp_path)


def test_an_index_that_names_what_its_files_lack(tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path)
    edit_config(tmp_path, dtype=None, torch_dtype=None)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"none.weight": "model.safetensors"}}))
    assert "model.safetensors in" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {"none.weight": "config.json"}}))
    assert "config.json in" in refusal(tmp_path)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([0, 1, 8, 48, 2**16]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family with its config.json, and of one with an image processor."""
    directories = {}
    for name in FAMILY_CASES:
        directories[name] = tmp_path_factory.mktemp(name)
        save(CASES[name], directories[name])
        (directories[name] / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    return directories


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_loads_or_is_refused(data: st.DataObject, stored: dict[str, Path]) -> None:
    directory = stored[data.draw(st.sampled_from(FAMILY_CASES))]
    path = directory / data.draw(st.sampled_from(["config.json", "config.json", "preprocessor_config.json"]))
    original = path.read_text()
    changed = json.loads(original)
    part = changed.get("vision_config", changed)
    known = PREPROCESSOR if "preprocessor" in path.name else {**CONFIG, **VISION_CONFIG}
    keys = st.sampled_from(sorted({*part, *known} - {"vision_config"}))
    part |= data.draw(st.dictionaries(keys, ANYTHING, min_size=1, max_size=3))
    path.write_text(json.dumps(changed))
    try:
        vit = ViT.from_pretrained(directory)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        vit(torch.zeros(1, 3, 2 * vit.config.patch_size, vit.config.patch_size))
    finally:
        path.write_text(original)
    assert "\n" not in message
