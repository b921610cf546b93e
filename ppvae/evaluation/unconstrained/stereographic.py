"""Coordinates of a sphere: stereographic projection, for latents that have no transform in torch."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor
from torch.distributions import Transform, constraints


@final
class InverseStereographic(Transform):
    """R^(d-1) -> the unit sphere of R^d: z = (2 u, |u|^2 - 1) / (|u|^2 + 1).

    Densities on the sphere are relative to its surface measure, and log |dz/du| = (d - 1) log(2 / (1 + |u|^2)). The
    last pole is the point at infinity.

    >>> transform, u = InverseStereographic(), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> transform(u).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]
    >>> torch.allclose(transform.inv(transform(u)), u)
    True
    """

    domain, codomain, bijective = constraints.real_vector, constraints.real_vector, True

    def _call(self, x: Tensor) -> Tensor:
        square = x.square().sum(-1, keepdim=True)
        return torch.cat([2 * x, square - 1], -1) / (square + 1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y[..., :-1] / (1 - y[..., -1:]).clamp(min=torch.finfo(y.dtype).eps)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """[...] of states x [..., d - 1]."""
        return x.shape[-1] * (math.log(2) - torch.log1p(x.square().sum(-1)))

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """[..., d - 1] -> [..., d]."""
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """[..., d] -> [..., d - 1]."""
        return torch.Size((*shape[:-1], shape[-1] - 1))
