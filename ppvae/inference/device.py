"""The device of a computation: chosen by name or by the pair's parameters, and torch's default meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ppvae.errors import UsageError
from ppvae.inference.param_store import program_device


def choose_device(
    device: str | int | torch.device | None, model: Callable[..., Any], guide: Callable[..., Any], data: Any
) -> torch.device:
    """The device that is asked for, else that of the pair's parameters, else that of the data.

    Raises:
        UsageError: there is no such device on this machine.
    """
    return program_device(model, guide, data) if device is None else find_device(device)


def find_device(device: str | int | torch.device, label: str = "device") -> torch.device:
    """The device of that name; `label` is what messages call the argument.

    Raises:
        UsageError: there is no such device on this machine.
    """
    try:
        place = torch.device(device)
        exists = place.type != "meta" and torch.empty(1, device=place).numel() == 1
    except (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError):
        exists = False
    if not exists:
        raise UsageError(
            f"{label}: expected one of this machine ({', '.join(available_devices())}), found {str(device)[:80]!r}"
        )
    return place


def available_devices() -> list[str]:
    """The names of the devices on which this machine computes.

    >>> "cpu" in available_devices()
    True
    """
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


@contextmanager
def default_device(place: torch.device) -> Iterator[None]:
    """Makes `place` the device of tensors that are made without one, where torch's default is another."""
    now = torch.get_default_device()
    if now.type == place.type and place.index in (None, now.index):
        yield
        return
    with place:
        yield
