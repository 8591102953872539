"""What a vision transformer returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True, eq=False)
class ViTOutput:
    """What a vision transformer gives, as the model of transformers gives it; None for what the checkpoint lacks.

    Attributes:
        last_hidden_state: `[B, N, C]`, all tokens, the prefix first; after the last norm, where the family has one
            there (CLIP and BEiT with mean pooling have not).
        pooler_output: `[B, C]`.
        logits: `[B, labels]`.
        image_embeds: `[B, projection size]`, CLIP's projection.
        hidden_states: What enters the first layer and what leaves each one, if asked for.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> ViTOutput:
        """The same with `function` of every tensor."""

        def each(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        states = None if self.hidden_states is None else tuple(map(function, self.hidden_states))
        pooled, logits, embeds = each(self.pooler_output), each(self.logits), each(self.image_embeds)
        return ViTOutput(function(self.last_hidden_state), pooled, logits, embeds, states)

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found


_pytree.register_pytree_node(
    ViTOutput,
    lambda output: ([getattr(output, field.name) for field in fields(output)], None),
    lambda values, _: ViTOutput(*values),
    serialized_type_name="visionkernels.models.ViTOutput",
)
