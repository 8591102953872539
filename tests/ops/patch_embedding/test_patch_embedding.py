"""The patch embedding against float64, on every backend, by the tolerance rule of `helpers.py`."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_accurate

from visionkernels.ops.patch_embedding.op import patch_embedding
from visionkernels.ops.patch_embedding.reference import normalise, reference_patch_embedding

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


def make(
    batch=2, height=32, width=48, size=16, channels=40, prefix=1, dtype=F32, pixels=None, channels_last=False,
    normalised=False,
):  # fmt: skip
    """Images, weight and options; of a model's size, so that half precision loses what it does there."""
    shape = (batch, height, width, 3) if channels_last else (batch, 3, height, width)
    if pixels == torch.uint8:
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
    else:
        images = torch.randn(shape, dtype=F64).to(pixels or dtype)
    patches = (height // size) * (width // size)
    options = {
        "bias": torch.randn(channels, dtype=F64).to(dtype),
        "position_embedding": torch.randn(patches, channels, dtype=F64).to(dtype),
        "prefix_tokens": torch.randn(prefix, channels, dtype=F64).to(dtype) if prefix else None,
        "channels_last": channels_last,
    }
    if normalised:
        options |= {"mean": MEAN, "std": STD}
    weight = torch.randn(channels, 3, size, size, dtype=F64) / (3**0.5 * size)
    return images, weight.to(dtype), options


def eager(
    pixels, weight, bias=None, position_embedding=None, prefix_tokens=None, mean=None, std=None, channels_last=False
):
    """The lines of a model, after those of its image processor."""
    wide = torch.promote_types(weight.dtype, F32)
    pixels = normalise(pixels, mean, std, channels_last, wide).to(weight.dtype)
    patches = F.conv2d(pixels, weight, bias, stride=weight.shape[2]).flatten(2).transpose(1, 2)
    if position_embedding is not None:
        patches = patches + position_embedding
    if prefix_tokens is not None:
        patches = torch.cat((prefix_tokens.expand(len(pixels), -1, -1), patches), 1)
    return patches


def check(backend, images, weight, options):
    """The operator is accurate on these inputs."""
    move = lambda x: x.to(backend.device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    moved = {name: move(option) for name, option in options.items()}
    got = patch_embedding(move(images), move(weight), **moved, backend=backend.backend)
    assert got.is_contiguous()
    double = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    truth = reference_patch_embedding(
        double(images), weight.double(), **{name: double(option) for name, option in options.items()}
    )
    assert_accurate("output", got.cpu(), truth, eager(images, weight, **options))
    return got.cpu()


SIZES = {
    "8": (8, 24, 16),
    "14": (14, 28, 42),
    "16": (16, 32, 48),
    "32": (32, 64, 32),
    "3": (3, 9, 6),
    "one": (16, 16, 16),
}


@LAYOUTS
@pytest.mark.parametrize(("size", "height", "width"), SIZES.values(), ids=SIZES)
def test_patch_sizes(backend, size, height, width, channels_last):
    check(backend, *make(size=size, height=height, width=width, channels_last=channels_last))


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("pixels", [F32, F16, BF16, F64, torch.uint8], ids=str)
def test_dtypes(backend, dtype, pixels, channels_last):
    inputs = make(dtype=dtype, pixels=pixels, normalised=pixels != F16, channels_last=channels_last)
    if pixels == F64 and backend.backend == "triton":
        with pytest.raises(TypeError, match=r"pixel_values must be float32, float16 or bfloat16.*float64"):
            check(backend, *inputs)
    else:
        check(backend, *inputs)


def test_float64(backend):
    inputs = make(dtype=F64, pixels=torch.uint8, normalised=True)
    if backend.backend == "triton":
        with pytest.raises(TypeError, match=r'weight must be float32, .* for backend="triton", got torch.float64'):
            check(backend, *inputs)
    else:
        check(backend, *inputs)


@pytest.mark.parametrize("channels", [1, 33, 130])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_channels_and_prefix(backend, channels, prefix):
    images, weight, options = make(channels=channels, prefix=prefix)
    output = check(backend, images, weight, options)
    if prefix:  # as they are
        assert torch.equal(output[:, :prefix], options["prefix_tokens"].expand(2, -1, -1))


@pytest.mark.parametrize("missing", ["bias", "position_embedding", "prefix_tokens", "all"])
def test_what_may_be_none(backend, missing):
    images, weight, options = make()
    names = [missing] if missing != "all" else ["bias", "position_embedding", "prefix_tokens"]
    check(backend, images, weight, options | dict.fromkeys(names))


@LAYOUTS
@pytest.mark.parametrize(("mean", "std"), [(MEAN, None), (None, STD), (None, None), (tuple(MEAN), torch.tensor(STD))])
@pytest.mark.parametrize("pixels", [F32, torch.uint8], ids=["float", "uint8"])
def test_normalisation(backend, mean, std, pixels, channels_last):
    images, weight, options = make(pixels=pixels, channels_last=channels_last)
    std = std.tolist() if isinstance(std, torch.Tensor) else std
    check(backend, images, weight, options | {"mean": mean, "std": std})
    if std is not None:
        given = patch_embedding(images, weight, mean=mean, std=torch.tensor(std), channels_last=channels_last)
        assert given.shape == (2, 6, 40)


def test_tables_of_another_dtype(backend):
    """Position and prefix in float32 beside a half-precision weight: added before the one rounding."""
    images, weight, options = make(dtype=F16)
    options = {n: o.float() if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    move = lambda x: x.to(backend.device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    got = patch_embedding(
        move(images), move(weight), **{n: move(o) for n, o in options.items()}, backend=backend.backend
    )
    assert got.dtype == F16
    double = {n: o.double() if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    truth = reference_patch_embedding(images.double(), weight.double(), **double)
    assert_accurate(
        "output",
        got.cpu(),
        truth,
        eager(
            images,
            weight,
            options["bias"].half(),
            *map(torch.Tensor.half, (options["position_embedding"], options["prefix_tokens"])),
        ),
    )


@pytest.mark.parametrize("shape", [(0, 32, 32), (2, 0, 32), (2, 32, 0)], ids=str)
def test_nothing_to_do(backend, shape):
    """Without patches the prefix is all there is."""
    batch, height, width = shape
    images, weight, options = make(batch=batch, height=height, width=width, prefix=2)
    move = lambda x: x.to(backend.device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    got = patch_embedding(
        move(images), move(weight), **{n: move(o) for n, o in options.items()}, backend=backend.backend
    )
    patches = (height // 16) * (width // 16)
    assert got.shape == (batch, 2 + patches, 40)
    if batch:
        assert torch.equal(got.cpu(), options["prefix_tokens"].expand(batch, -1, -1))


@LAYOUTS
@pytest.mark.parametrize("form", ["crop", "images", "flipped", "weight"])
def test_strides(backend, form, channels_last):
    images, weight, options = make(batch=4, channels_last=channels_last)
    if form == "crop":  # part of a larger image, from an odd column on
        larger = torch.randn(4, 40, 64, 3) if channels_last else torch.randn(4, 3, 40, 64)
        images = larger[:, 5:37, 7:55] if channels_last else larger[:, :, 5:37, 7:55]
    elif form == "images":
        images = images[1::2]
    elif form == "flipped":  # the other layout in memory
        images = (
            images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
            if channels_last
            else images.to(memory_format=torch.channels_last)
        )
    else:
        weight = weight.to(memory_format=torch.channels_last)
    check(backend, images, weight, options)


def test_nan_stays_in_its_patch(backend):
    images, weight, options = make()
    images[1, 2, 17, 20] = torch.nan  # patch (1, 1) of the second image
    move = lambda x: x.to(backend.device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    got = patch_embedding(
        move(images), move(weight), **{n: move(o) for n, o in options.items()}, backend=backend.backend
    )
    expected = torch.zeros(2, 7, 40, dtype=torch.bool)
    expected[1, 1 + 4] = True
    assert torch.equal(got.isnan().cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [14, 16])
@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
def test_model_sizes(size, batch, dtype):
    """Every tile that is chosen, on 224 x 224."""
    images, weight, options = make(batch, 224, 224, size, 768, dtype=dtype, pixels=torch.uint8, normalised=True)
    images, weight, options = (
        images.cuda(),
        weight.cuda(),
        {n: o.cuda() if isinstance(o, torch.Tensor) else o for n, o in options.items()},
    )
    got = patch_embedding(images, weight, **options, backend="triton")
    double = {n: o.double() if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    truth = reference_patch_embedding(images, weight.double(), **double)
    assert_accurate("output", got, truth, eager(images, weight, **options))
