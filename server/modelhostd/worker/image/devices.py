"""Where slabs are: the GPU of a device, or RAM that stands for one."""

import torch


def find_device(device: str) -> torch.device:
    """Return torch's device for the id of a device: ``cpu``, ``cuda-N``, or ``sim-N`` (in RAM)."""
    kind, _, index = device.partition("-")
    return torch.device("cuda", int(index)) if kind == "cuda" else torch.device("cpu")
