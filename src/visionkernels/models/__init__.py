"""Vision transformers over this package's operators, for inference."""

from visionkernels.models.config import FAMILIES, ViTConfig
from visionkernels.models.vit import ViT, ViTOutput

__all__ = ["FAMILIES", "ViT", "ViTConfig", "ViTOutput"]
