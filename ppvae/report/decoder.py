"""The network of a likelihood as plain numbers, which a page evaluates: for multilayer perceptrons of common layers."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_WEIGHTS = 400_000  # a page of numbers stays small
LEVELS = 32767  # of a 16-bit weight
TOLERANCE = 2e-3  # of the range of the means: below a step of 256 levels
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh", nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.Softplus: "softplus", nn.ELU: "elu",
}  # fmt: skip
SKIPPED = (nn.Dropout, nn.Identity, nn.Flatten, nn.Unflatten)  # the identity on a flat vector in evaluation mode
LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda out: out, "sigmoid": torch.sigmoid, "softplus": nn.functional.softplus, "exp": torch.exp,
}  # fmt: skip
DEFAULTS = {nn.Softplus: {"beta": 1.0, "threshold": 20.0}, nn.ELU: {"alpha": 1.0}}


def decoder_numbers(decode: Callable[[Tensor], Tensor], z: Tensor) -> dict[str, Any] | None:
    """A decoder z [D] -> mean [E] as JSON values, or None where it is no such network.

    While `decode` runs on z [M, D], the sequential networks that are called with z are recorded. One of them is taken
    if its output, or the first half of it, after a link function gives the means: the numbers of the page, rounded to
    16 bits, are compared with what the pair gives, within `TOLERANCE` of the range of the means.
    """
    found: list[nn.Sequential] = []

    def record(module: nn.Module, inputs: Any, _: Any) -> None:
        given = inputs[0] if inputs else None
        if isinstance(module, nn.Sequential) and isinstance(given, Tensor) and given.shape[-1:] == z.shape[1:]:
            rows = given.reshape(-1, z.shape[1])
            if rows.shape == z.shape and torch.allclose(rows.to(z), z):
                found.append(module)

    hook = nn.modules.module.register_module_forward_hook(record)
    try:
        means = decode(z).reshape(len(z), -1).double()  # one number a datum has no event dims
    finally:
        hook.remove()
    width = float(means.max() - means.min())
    for network in found:
        layers = _layers(network)
        if layers is None:
            continue
        out = _evaluate(layers, z.double())
        for name, link in LINKS.items():
            if out.shape[1] not in (means.shape[1], 2 * means.shape[1]):
                continue
            made = link(out[:, : means.shape[1]])
            if bool((made - means).abs().max() <= TOLERANCE * width):
                return {"link": name, "outputs": means.shape[1], "layers": [_numbers(layer) for layer in layers]}
    return None


_Layer = str | tuple[Tensor, Tensor, float, float]  # an activation; or 16-bit weights and biases, and their units


def _layers(network: nn.Sequential) -> list[_Layer] | None:
    """The layers of a network, or None where one of them is not known."""
    out: list[_Layer] = []
    modules = [m for m in network.modules() if not isinstance(m, nn.Sequential) and not isinstance(m, SKIPPED)]
    for module in modules:
        if type(module) is nn.Linear:
            held = module.bias if module.bias is not None else torch.zeros(module.out_features)
            weight, weight_unit = _rounded(module.weight)
            bias, bias_unit = _rounded(held)
            out.append((weight, bias, weight_unit, bias_unit))
        elif type(module) in ACTIVATIONS and all(
            getattr(module, name) == value for name, value in DEFAULTS.get(type(module), {}).items()
        ):
            out.append(ACTIVATIONS[type(module)])
        else:
            return None
    size = sum(layer[0].numel() for layer in out if not isinstance(layer, str))
    return out if 0 < size <= MAX_WEIGHTS else None


def _rounded(values: Tensor) -> tuple[Tensor, float]:
    """(16-bit integers, their unit)."""
    values = values.detach().cpu().double()
    unit = float(values.abs().max()) / LEVELS or 1.0
    return (values / unit).round(), unit


def _evaluate(layers: list[_Layer], z: Tensor) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {name: kind() for kind, name in ACTIVATIONS.items()}
    for layer in layers:
        if isinstance(layer, str):
            z = functions[layer](z)
        else:
            weight, bias, weight_unit, bias_unit = layer
            z = z @ (weight * weight_unit).T + bias * bias_unit
    return z


def _numbers(layer: _Layer) -> Any:
    if isinstance(layer, str):
        return layer
    weight, bias, weight_unit, bias_unit = layer
    coded = np.concatenate([t.numpy().astype("<i2").ravel() for t in (weight, bias)])
    return {
        "shape": list(weight.shape), "units": [weight_unit, bias_unit],
        "values": base64.b64encode(coded.tobytes()).decode(),
    }  # fmt: skip
