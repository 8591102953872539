"""Vision transformers over this package's operators, for inference."""

from visionkernels.models.config import ViTConfig
from visionkernels.models.families import FAMILIES
from visionkernels.models.output import ViTOutput
from visionkernels.models.vit import ViT

__all__ = ["FAMILIES", "ViT", "ViTConfig", "ViTOutput"]
