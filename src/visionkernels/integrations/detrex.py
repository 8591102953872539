"""detrex: its module, on the fused operator.

`visionkernels.install_extension("detrex._C")` makes detrex's own module run instead.
"""

from visionkernels.integrations import _mmcv_attention
from visionkernels.integrations.table import Row

ROWS = (
    Row(
        "detrex",
        "0.3.0 (e244e6c)",
        "detrex.layers.MultiScaleDeformableAttention",
        "from visionkernels.integrations.detrex import MultiScaleDeformableAttention",
    ),
)


class MultiScaleDeformableAttention(_mmcv_attention.MultiScaleDeformableAttention):
    """detrex's module, with its constructor, parameters and initialisation. Needs no detrex.

    It is mmcv's under other names, and a call takes the same arguments.

    Args:
        embed_dim: channels of query, value and output.
        num_heads: attention heads; must divide `embed_dim`.
        num_levels: feature levels.
        num_points: sampling points of a head on a level.
        img2col_step: does nothing.
        dropout: probability of the dropout before the identity is added.
        batch_first: whether the batch is the first axis of query, value and output; otherwise it is the second.

    Raises:
        ValueError: `embed_dim` is not divisible by `num_heads`.

    Source:
        `detrex/layers/multi_scale_deform_attn.py`.

    Example:
        >>> import torch
        >>> attention = MultiScaleDeformableAttention(32, num_heads=4, num_levels=1, num_points=2, batch_first=True)
        >>> query, pixels, references = torch.randn(1, 5, 32), torch.randn(1, 6, 32), torch.rand(1, 5, 1, 2)
        >>> attention(query, value=pixels, reference_points=references, spatial_shapes=[(2, 3)]).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        img2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
    ) -> None:
        if embed_dim % num_heads != 0:
            raise ValueError(
                f"embed_dim must be divisible by num_heads, got embed_dim={embed_dim} and num_heads={num_heads}"
            )
        super().__init__(embed_dim, num_heads, num_levels, num_points, img2col_step, dropout, batch_first)
        self.embed_dim = embed_dim
