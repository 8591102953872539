"""Which device to run on."""

import torch

from visionkernels.errors import UserError


def find_device(device: str | torch.device | None) -> torch.device:
    """The device to run on, with its index if it is a GPU.

    Raises:
        UserError: If it is neither the CPU nor a GPU of this machine.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device: expected cpu, cuda or cuda:<index>, but it is {str(device)!r}") from error
    if found.type == "cpu":
        return found
    if found.type != "cuda":
        raise UserError(f"device: expected cpu, cuda or cuda:<index>, but it is {str(device)!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = found.index or 0
    if index >= count:
        there = f"torch sees {count} GPU{'s' if count > 1 else ''}" if count else "torch sees no GPU; use the CPU"
        raise UserError(f"device: {device} is not there: {there}")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else index)


def describe(device: torch.device) -> str:
    """The device in words: which GPU, or how many CPU threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"the CPU ({threads} thread{'s' if threads > 1 else ''})"
