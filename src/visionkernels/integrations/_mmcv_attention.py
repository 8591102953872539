"""The module of mmcv and detrex on the fused operator: its `forward`, which also runs on mmcv's own, and the module."""

from typing import Any

import torch
from torch import Tensor, nn

from visionkernels.nn.deformable_attention import initialise
from visionkernels.ops.deformable_attention.checks import SpatialShapes
from visionkernels.ops.deformable_attention.op import fused_ms_deform_attn


def attend(
    self: Any,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    identity: Tensor | None = None,
    query_pos: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    reference_points: Tensor | None = None,
    spatial_shapes: SpatialShapes | None = None,
    level_start_index: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The `forward` of mmcv's and detrex's modules on the fused operator.

    Args:
        self: the module: one of this package, or upstream's.
        query: `[num_query, bs, embed_dims]`; with `batch_first`, `[bs, num_query, embed_dims]`.
        key: not used, as upstream.
        value: `[num_value, bs, embed_dims]` or batch first, the levels one after another; `query` where None.
        identity: what is added to the result, shaped like `query`; `query` where None, without `query_pos`.
        query_pos: added to `query` for offsets and weights.
        key_padding_mask: bool `[bs, num_value]`, **True = padding**; padded pixels are read as 0.
        reference_points: `[bs, num_query, num_levels, 2]` (x, y) or `[bs, num_query, num_levels, 4]`
            (cx, cy, w, h), 0 to 1 across the padded image; batch first always.
        spatial_shapes: `[num_levels, 2]`, (h, w), or a list of pairs.
        level_start_index: follows from the shapes and is not read.
        **kwargs: `residual` is mmcv's older name for `identity`; others are not used, as upstream.

    Returns:
        Shaped like `query`: the attention after dropout, plus `identity`.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_ms_deform_attn`; an argument is no tensor, query or value has not
            three axes, `key_padding_mask` is not bool.
    """
    if reference_points is None or spatial_shapes is None:
        raise TypeError("reference_points and spatial_shapes must be given, got None")
    value = query if value is None else value
    identity = kwargs.get("residual") if identity is None else identity
    identity = query if identity is None else identity
    _check_tensors(query=query, value=value, identity=identity, query_pos=query_pos, key_padding_mask=key_padding_mask)
    query = query if query_pos is None else query + query_pos
    if not self.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    samples = (self.num_heads, self.num_levels, self.num_points)
    output = fused_ms_deform_attn(
        self.value_proj(value).unflatten(2, (self.num_heads, -1)),
        spatial_shapes,
        reference_points,
        self.sampling_offsets(query).unflatten(2, (*samples, 2)),
        self.attention_weights(query).unflatten(2, samples),
        value_mask=None if key_padding_mask is None else ~key_padding_mask,
    )
    output = self.output_proj(output)
    if not self.batch_first:
        output = output.transpose(0, 1)
    return self.dropout(output) + identity


def _check_tensors(
    query: Tensor, value: Tensor, identity: Tensor, query_pos: Tensor | None, key_padding_mask: Tensor | None
) -> None:
    """What the lines of `attend` need; the operator checks sizes, dtypes and devices."""
    given = {"query": query, "value": value, "identity": identity}
    given |= {} if query_pos is None else {"query_pos": query_pos}
    given |= {} if key_padding_mask is None else {"key_padding_mask": key_padding_mask}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if name in ("query", "value") and tensor.dim() != 3:
            raise ValueError(f"{name} must have three axes, got {list(tensor.shape)}")
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be bool, True where padded, got {key_padding_mask.dtype}")


class MultiScaleDeformableAttention(nn.Module):
    """mmcv's module, with its constructor, parameters and initialisation, on the fused operator. Needs no mmcv.

    Args:
        embed_dims: channels of query, value and output.
        num_heads: attention heads; must divide `embed_dims`.
        num_levels: feature levels.
        num_points: sampling points of a head on a level.
        im2col_step: does nothing.
        dropout: probability of the dropout before the identity is added.
        batch_first: whether the batch is the first axis of query, value and output; otherwise it is the second.
        norm_cfg: does nothing, as in mmcv.
        init_cfg: does nothing, as in mmcv.
        value_proj_ratio: channels of the projected value, in units of `embed_dims`.

    Raises:
        ValueError: `embed_dims` is not divisible by `num_heads`.

    Source:
        `mmcv/ops/multi_scale_deform_attn.py`.

    Example:
        >>> attention = MultiScaleDeformableAttention(32, num_heads=4, num_levels=1, num_points=2)
        >>> query, pixels, references = torch.randn(5, 1, 32), torch.randn(6, 1, 32), torch.rand(1, 5, 1, 2)
        >>> attention(query, value=pixels, reference_points=references, spatial_shapes=[(2, 3)]).shape
        torch.Size([5, 1, 32])
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        if embed_dims % num_heads != 0:
            raise ValueError(
                f"embed_dims must be divisible by num_heads, got embed_dims={embed_dims} and num_heads={num_heads}"
            )
        self.norm_cfg, self.init_cfg = norm_cfg, init_cfg
        self.dropout = nn.Dropout(dropout)
        self.batch_first = batch_first
        self.im2col_step = im2col_step
        self.embed_dims = embed_dims
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dims, samples * 2)
        self.attention_weights = nn.Linear(embed_dims, samples)
        self.value_proj = nn.Linear(embed_dims, int(embed_dims * value_proj_ratio))
        self.output_proj = nn.Linear(self.value_proj.out_features, embed_dims)
        self.init_weights()

    def init_weights(self) -> None:
        """As Deformable-DETR's module, under the name by which mmcv calls it."""
        initialise(self, self.num_heads, self.num_levels, self.num_points)

    forward = attend
