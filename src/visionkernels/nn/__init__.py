"""Modules over the operators, with the parameter names of the modules they stand in for."""

from visionkernels.nn.deformable_attention import MSDeformAttn, MultiscaleDeformableAttention

__all__ = ["MSDeformAttn", "MultiscaleDeformableAttention"]
