"""An estimate of log p(x) read back from the files that it was saved to."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import CheckpointError
from ppvae.evaluation.arviz import GROUP
from ppvae.evaluation.estimate import Estimate

FIELDS = ("log_px", "std_error", "ess", "k_hat", "elbo", "nonfinite")
DERIVED = (
    "nll", "nll_std_error", "bits_per_dim", "unreliable", "num_data", "curve", "summary", "per_datum", "elbo",
)  # fmt: skip


def load_estimate(path: str | os.PathLike[str]) -> Estimate:
    """Reads what `Estimate.save` wrote, given the path of the JSON file; bounds and draws are in the NetCDF beside it.

    Raises:
        CheckpointError: no such file, or another one.

    >>> import tempfile
    >>> one = torch.ones(30).double()
    >>> values = (-one, 0.1 * one, 90 * one, 0.2 * one, -2 * one, 0 * one)
    >>> est = Estimate(*values, 100, 0, 3, "density", bounds={1: -2 * one})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_estimate(est.save(folder))
    >>> again.table() == est.table(), torch.equal(again.bound(1), est.bound(1))
    (True, True)
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        rows = {name: _tensor(values) for name, values in content["per_datum"].items()}
        own = {f.name for f in dataclasses.fields(Estimate)}
        plain: dict[str, Any] = {k: v for k, v in content.items() if k in own and k not in DERIVED}
        settings = {k: v for k, v in content.items() if k not in own and k not in DERIVED}
        reliable = rows.pop("reliable").bool()
        bounds, posterior = _arrays(path.with_suffix(".nc"))
        words = content.get("notes", "")
        plain |= {name: rows.pop(name) for name in FIELDS}
        plain |= {"notes": tuple(words.split("; ")) if words else (), "levels": content.get("levels") or None}
        est = Estimate(**plain, bounds=bounds, posterior=posterior or None, settings=settings, diagnostics=rows)
        if est.method == "importance sampling" and torch.equal(est.reliable, reliable):
            return est
        return dataclasses.replace(est, trusted=reliable)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a saved estimate ({type(error).__name__}: {error})") from error


def _tensor(values: list[Any]) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def _arrays(path: Path) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """(bounds per datum, draws of the latents), none where there is no such file."""
    if not path.exists():
        return {}, {}
    import h5py

    with h5py.File(path) as file:
        kept = {name: torch.from_numpy(values[()]) for name, values in file[GROUP].items() if name.startswith("bound_")}
        draws = file.get("posterior", {})
        latents = {n: torch.from_numpy(v[0]) for n, v in draws.items() if v.ndim > 2}
    return {int(name.removeprefix("bound_")): values for name, values in kept.items()}, latents
