"""What the operators of the ViT share: what a launch refuses."""

import pytest
import torch

from visionkernels.ops import _inference
from visionkernels.ops._inference import Device


class Kernel:
    """A kernel that notes its launches."""

    __name__ = "_layer_norm_kernel"

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append(arguments)


@pytest.mark.parametrize(
    ("capability", "dtype", "refused"),
    [
        ((7, 5), torch.bfloat16, True),
        ((7, 0), torch.bfloat16, True),
        ((7, 5), torch.float16, False),
        ((8, 0), torch.bfloat16, False),
        ((0, 0), torch.bfloat16, False),  # not one of NVIDIA's
    ],
    ids=str,
)
def test_bfloat16_on_a_gpu_without_it(capability, dtype, refused, monkeypatch):
    monkeypatch.setattr(_inference, "device_of", lambda device: Device(40, capability))
    kernel, x = Kernel(), torch.zeros(4, dtype=dtype)
    if refused:
        words = rf"^layer_norm takes no bfloat16 on cpu, .* capability 7\.{capability[1]} and needs 8\.0; convert"
        with pytest.raises(TypeError, match=words):
            _inference.launch(kernel, 1, (torch.zeros(4), None, x, 3), x.device)
        assert not kernel.launched
    else:
        _inference.launch(kernel, 1, (torch.zeros(4), None, x, 3), x.device)
        assert len(kernel.launched) == 1
