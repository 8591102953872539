"""What is made of the last hidden state: a pooled vector, logits, and CLIP's image embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionkernels.models.config import ViTConfig
from visionkernels.models.modules import Affine, Options
from visionkernels.ops.attention.op import attention
from visionkernels.ops.linear.op import linear


class Heads(nn.Module):
    """The heads that a checkpoint has.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        channels = config.hidden_size
        self.pooling, self.sees, self.num_prefix_tokens = config.pooling, config.classifier, config.num_prefix_tokens
        self.pooler = Affine(config.pooler_size or channels, channels) if config.pooling == "dense" else None
        self.pooler_norm = Affine(channels) if config.pooling in ("class_norm", "mean_norm") else None
        self.pool = AttentionPool(config) if config.pooling == "attention" else None
        self.projection = Affine(config.projection_size, channels, bias=False) if config.projection_size else None
        seen, labels = channels * (2 if config.classifier == "class_and_mean" else 1), len(config.labels)
        self.classifier = Affine(labels, seen) if config.classifier else None
        self.distillation_classifier = Affine(labels, seen) if config.classifier == "distilled" else None

    def forward(self, last: Tensor, options: Options) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Apply the heads.

        Args:
            last: The last hidden state, `[B, N, C]`.
            options: Of the operators.

        Returns:
            `pooler_output`, `logits` and `image_embeds` of a `ViTOutput`.
        """
        pooled = self._pooled(last, options)
        embeds = None if self.projection is None or pooled is None else self.projection.linear(pooled, options)
        return pooled, self._logits(last, pooled, options), embeds

    def _pooled(self, last: Tensor, options: Options) -> Tensor | None:
        if self.pooling is None:
            return None
        if self.pool is not None:
            return self.pool(last, options)
        pooled = last[:, 1:].mean(1) if self.pooling == "mean_norm" else last[:, 0]
        if self.pooler_norm is not None:
            return self.pooler_norm.norm(pooled, options)
        if self.pooler is not None:
            return self.pooler.linear(pooled, options).tanh()
        return pooled.clone()  # no view, which would keep all tokens alive

    def _logits(self, last: Tensor, pooled: Tensor | None, options: Options) -> Tensor | None:
        if self.classifier is None:
            return None
        patches = last[:, self.num_prefix_tokens :]
        if self.distillation_classifier is not None:
            logits = self.classifier.linear(last[:, 0], options)
            return (logits + self.distillation_classifier.linear(last[:, 1], options)) / 2
        if self.sees == "class_and_mean":
            seen = torch.cat([last[:, 0], patches.mean(1)], 1)
        elif self.sees == "mean":
            seen = patches.mean(1)
        elif self.sees == "pooled" and pooled is not None:
            seen = pooled
        else:
            seen = last[:, 0]
        return self.classifier.linear(seen, options)


class AttentionPool(nn.Module):
    """SigLIP's pooling: one learned query attends to all tokens, and an MLP follows.

    Args:
        config: The model's shape.
    """

    probe: Tensor

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        channels = config.hidden_size
        self.num_heads = config.num_heads
        self.register_buffer("probe", torch.randn(1, channels))
        self.qkv = Affine(3 * channels, channels)
        self.output = Affine(channels, channels)
        self.norm = Affine(channels)
        self.fc1 = Affine(config.intermediate_size, channels)
        self.fc2 = Affine(channels, config.intermediate_size)

    def forward(self, x: Tensor, options: Options) -> Tensor:
        """Pool the tokens.

        Args:
            x: `[B, N, C]`.
            options: Of the operators.

        Returns:
            `[B, C]`.
        """
        channels = x.shape[2]
        weight, bias = self.qkv.weight, self.qkv.bias
        assert bias is not None
        precision, backend = options.precision, options.backend
        query = linear(self.probe, weight[:channels], bias[:channels], precision=precision, backend=backend)
        memory = linear(x, weight[channels:], bias[channels:], precision=precision, backend=backend)
        # The operator has as many queries as keys: the same one for each token, and one result is read. Its scores are
        # a small part of one layer's work, and backend and precision are kept.
        query = query.view(1, 1, self.num_heads, -1).repeat(*x.shape[:2], 1, 1)
        key, value = memory.unflatten(2, (2, self.num_heads, -1)).unbind(2)
        mixed = attention(query, key, value, backend=backend)[:, 0].flatten(1)
        pooled = self.output.linear(mixed, options)
        hidden = self.fc1.linear(self.norm.norm(pooled, options), options, activation=options.activation)
        return self.fc2.linear(hidden, options, residual=pooled)
