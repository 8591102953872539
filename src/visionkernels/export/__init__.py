"""Out of PyTorch: ONNX in standard operators, ONNX with TensorRT's plugin, and AOTInductor packages."""

from visionkernels.export import aoti, onnx, tensorrt

__all__ = ["aoti", "onnx", "tensorrt"]
