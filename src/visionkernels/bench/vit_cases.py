"""The workloads of whole vision transformers and of their operators, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelCase:
    """A whole vision transformer at one batch size, up to its last hidden state.

    Attributes:
        name: What ``--case`` takes.
        title: The model's name, for tables.
        batch: B, images.
        family: Whose model of transformers it is: ``vit`` or ``dinov2``.
        timm: Its name in timm.
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels.
        hidden_size: C.
        num_layers: Layers.
        num_heads: H.
        tags: As of ``cases.Case``. A case with ``breakdown`` is also profiled; one with ``slow`` also measured under
            ``torch.compile`` where that is asked for.

    Example:
        >>> MODELS["vit-b-n1"].tokens
        197
    """

    name: str
    title: str
    batch: int
    family: str
    timm: str
    image_size: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    tags: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelCase:
        """The case that ``dataclasses.asdict`` and JSON made these fields of."""
        return cls(**{**fields, "tags": tuple(fields["tags"])})

    @property
    def tokens(self) -> int:
        """N, the class token among them."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def flops(self) -> int:
        """Multiplications and additions of all matrix products, attention's among them."""
        tokens, width = self.tokens, self.hidden_size
        layer = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
        return self.batch * (self.num_layers * layer + 6 * (tokens - 1) * width * self.patch_size**2)

    @property
    def sizes(self) -> str:
        """The sizes, in words."""
        return f"batch {self.batch}, {self.image_size}×{self.image_size}, {self.tokens} tokens"

    @property
    def description(self) -> str:
        """The case in one line."""
        return f"{self.title}: {self.sizes}, {self.num_layers} layers, {self.num_heads}×{self.width_of_head}"

    @property
    def width_of_head(self) -> int:
        """D."""
        return self.hidden_size // self.num_heads

    @property
    def label(self) -> str:
        """The case in a line of the README."""
        return f"{self.title}, {self.image_size}², batch {self.batch}"

    @property
    def group(self) -> str:
        """Cases of one group share a table or a curve."""
        return f"{self.title}, {self.image_size}×{self.image_size}"

    @property
    def size(self) -> int:
        """What grows along a curve."""
        return self.batch

    axis = "batch"  # what that is, in words
    grouped = True


_ABOUT = {  # title: family, timm's name, image size, patch size, width, layers, heads
    "ViT-Ti/16": ("vit", "vit_tiny_patch16_224", 224, 16, 192, 12, 3),
    "ViT-B/16": ("vit", "vit_base_patch16_224", 224, 16, 768, 12, 12),
    "ViT-L/16": ("vit", "vit_large_patch16_224", 224, 16, 1024, 24, 16),
    "DINOv2-B/14": ("dinov2", "vit_base_patch14_dinov2", 518, 14, 768, 12, 12),
}
_NAMES = {"ViT-Ti/16": "vit-ti", "ViT-B/16": "vit-b", "ViT-L/16": "vit-l", "DINOv2-B/14": "dinov2-b"}


def _model(title: str, batch: int, *tags: str) -> ModelCase:
    return ModelCase(f"{_NAMES[title]}-n{batch}", title, batch, *_ABOUT[title], tags)


_MODEL_CASES = (
    _model("ViT-Ti/16", 1, "quick"),
    _model("ViT-Ti/16", 8, "quick"),
    _model("ViT-B/16", 1, "gpu", "cpu", "headline", "slow", "breakdown"),
    _model("ViT-B/16", 8, "gpu", "cpu", "headline", "slow"),
    _model("ViT-B/16", 32, "gpu", "headline", "slow"),
    _model("ViT-B/16", 128, "gpu", "headline", "slow", "breakdown"),
    _model("ViT-B/16", 256, "gpu", "headline", "slow"),
    *(_model("ViT-L/16", batch, "gpu", "headline") for batch in (1, 32, 128)),
    *(_model("DINOv2-B/14", batch, "gpu", "headline") for batch in (1, 32, 128)),
)
MODELS = {case.name: case for case in _MODEL_CASES}


@dataclass(frozen=True)
class OpCase:
    """One operator of a vision transformer at one size.

    Attributes:
        name: What ``--case`` takes.
        title: What it computes, for tables; cases of one title are a curve.
        op: ``layer_norm``, ``linear``, ``attention`` or ``patch_embedding``.
        axis: What grows along the curve, in words.
        rows: M of a layer norm or linear layer, N of an attention, images of a patch embedding.
        batch: Images; 1 where all images' tokens are the rows.
        in_features: C, of a linear layer its input's.
        out_features: F of a linear layer; else C.
        num_heads: H of an attention.
        activation: After a linear layer, or None.
        residual: Whether a residual is added after it.
        tags: As of ``cases.Case``.

    Example:
        >>> OPERATORS["linear-qkv-m197"].description
        'linear 768 → 2304: 197 rows'
    """

    name: str
    title: str
    op: str
    axis: str
    rows: int
    batch: int = 1
    in_features: int = 768
    out_features: int = 768
    num_heads: int = 12
    activation: str | None = None
    residual: bool = False
    tags: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> OpCase:
        """The case that ``dataclasses.asdict`` and JSON made these fields of."""
        return cls(**{**fields, "tags": tuple(fields["tags"])})

    @property
    def flops(self) -> int | None:
        """Multiplications and additions of the matrix products; None of a layer norm."""
        if self.op == "linear":
            return 2 * self.rows * self.in_features * self.out_features
        if self.op == "attention":
            return 4 * self.batch * self.rows**2 * self.in_features
        return 2 * self.rows * 196 * 768 * self.out_features if self.op == "patch_embedding" else None

    @property
    def sizes(self) -> str:
        """The sizes, in words."""
        images = f", batch {self.batch}" if self.op == "attention" else ""
        return f"{self.rows} {self.axis}{images}"

    @property
    def description(self) -> str:
        """The case in one line."""
        return f"{self.title}: {self.sizes}"

    label = description
    grouped = True

    @property
    def group(self) -> str:
        """Cases of one group share a table or a curve."""
        return self.title

    @property
    def size(self) -> int:
        """What grows along a curve."""
        return self.rows


_IMAGE = 197  # tokens
_ROWS = (1, 2, 8, 32, 128, 256)  # images whose tokens are the rows
_QUICK_ROWS = (1, 4)
_ATTENDED = (  # tokens and images: about as many tokens in all
    (64, 256), (128, 128), (_IMAGE, 128), (256, 64), (512, 32), (1024, 16), (1370, 12), (2048, 8), (4096, 4),
)  # fmt: skip


def _sized(sizes: tuple[int, ...], few: tuple[int, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """Each size with its tags; the few are measured on a CPU too."""
    tags = dict.fromkeys(sizes, ("gpu",))
    return [
        (size, (*tags.get(size, ()), *(("cpu", "quick") if size in few else ()))) for size in sorted({*sizes, *few})
    ]


def _linear(name: str, words: str, in_features: int, out_features: int, **epilogue: Any) -> list[OpCase]:
    title = f"linear {in_features} → {out_features}{words}"
    return [
        OpCase(
            f"linear-{name}-m{_IMAGE * images}", title, "linear", "rows", _IMAGE * images, 1, in_features,
            out_features, **epilogue, tags=tags,
        )
        for images, tags in _sized(_ROWS, _QUICK_ROWS)
    ]  # fmt: skip


def _attention(name: str, title: str, tokens: int, batch: int, *tags: str) -> OpCase:
    return OpCase(name, title, "attention", "tokens", tokens, batch, tags=tags)


_OP_CASES = (
    *(
        OpCase(f"layer-norm-m{_IMAGE * images}", "layer norm, C=768", "layer_norm", "rows", _IMAGE * images, tags=tags)
        for images, tags in _sized((1, 4, 16, 64, 256, 1024), _QUICK_ROWS)
    ),
    *_linear("qkv", "", 768, 2304),
    *_linear("output", " + residual", 768, 768, residual=True),
    *_linear("up", ", GELU", 768, 3072, activation="gelu"),
    *_linear("down", " + residual", 3072, 768, residual=True),
    *(
        _attention(f"attention-n{tokens}", "attention, 12 heads of 64", tokens, batch, "gpu")
        for tokens, batch in _ATTENDED
    ),
    *(
        _attention(f"attention-n{tokens}-single", "attention of one image, 12 heads of 64", tokens, 1, *tags)
        for tokens, tags in _sized((_IMAGE, 577, 1370, 4096), (64, _IMAGE))
    ),
    *(
        OpCase(
            f"patch-embedding-n{images}", "patch embedding, 224×224, 16×16", "patch_embedding", "images", images,
            images, tags=tags,
        )
        for images, tags in _sized((1, 8, 32, 128, 256), (1, 2))
    ),
)  # fmt: skip
OPERATORS = {case.name: case for case in _OP_CASES}
