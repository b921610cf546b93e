"""Files of results: numbers and strings in `<name>.json`, arrays in `<name>.npz`, both for ArviZ in `<name>.nc`."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ppvae.errors import CheckpointError
from ppvae.evaluation.arviz import ESS_BY_STEP, GROUP, SITE
from ppvae.evaluation.estimate import MIXED_METHOD, Estimate
from ppvae.evaluation.reliability import error_words
from ppvae.run_folder.atomic_commit import written_together
from ppvae.run_folder.identity import ORIGIN, read_result, write_result
from ppvae.storage import read_json, write_bytes


class SaveableResult:
    """Base of frozen dataclasses of tensors, dicts of tensors, numbers and strings that are saved and loaded.

    A field with metadata {"saved": False} is not saved, and has its default after loading.
    """

    def save(
        self, directory: str | os.PathLike[str], name: str | None = None, origin: Mapping[str, str] | None = None
    ) -> Path:
        """Writes `<name>.json`, `.npz` and `.nc` (for ArviZ), all or none; named after the class by default.

        `origin` is that of the run, `Run.origin`, which the files then carry.

        Raises:
            CheckpointError: they cannot be written; what was there before is kept.
        """
        from ppvae.evaluation.arviz import write_netcdf

        kind = type(self).__name__
        name = name or kind.lower()
        arrays: dict[str, np.ndarray] = {}
        plain: dict[str, Any] = {}
        for field in _saved(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                arrays[field.name] = value.cpu().numpy()
            elif isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values()):
                plain[field.name] = {"sites": list(value)}
                arrays |= {f"{field.name}/{i}": v.cpu().numpy() for i, v in enumerate(value.values())}
            else:
                plain[field.name] = _plain(value)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        content = {"kind": kind, "table": self.table(), "fields": plain}
        with written_together(Path(directory), name) as folder:
            files = [folder / f"{name}.npz", folder / f"{name}.nc"]
            write_bytes(files[0], buffer.getvalue())
            write_netcdf(self.netcdf_groups(), files[1])
            write_result(folder / f"{name}.json", content, files, origin)
        return Path(directory) / f"{name}.json"

    def to_arviz(self) -> Any:
        """All arrays for ArviZ, in one group that is named after the class: `InferenceData` or `DataTree`."""
        from ppvae.evaluation.arviz import arrays_to_arviz

        arrays: dict[str, Tensor] = {}
        for field in _saved(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                arrays[field.name] = value.cpu()
            elif isinstance(value, dict):
                arrays |= {f"{field.name}/{site}": v.cpu() for site, v in value.items() if isinstance(v, Tensor)}
        return arrays_to_arviz(type(self).__name__.lower(), arrays, self.table())

    def netcdf_groups(self) -> Any:
        """What `<name>.nc` holds: all arrays in one group."""
        return SaveableResult.to_arviz(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Loads a saved result, given the path of the JSON file.

        Raises:
            CheckpointError: a file is missing or damaged, or holds a result of another kind.
        """
        path = Path(path)
        try:
            content = read_result(path)
        except (OSError, ValueError, CheckpointError) as error:
            raise CheckpointError(f"{path}: not a saved {cls.__name__} as it was written ({error})") from error
        try:
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
            if content["kind"] != cls.__name__:
                raise CheckpointError(f"{path}: expected a result of kind {cls.__name__}, found {content['kind']}")
            values: dict[str, Any] = {}
            for field in _saved(cls):
                if field.name in arrays:
                    values[field.name] = arrays[field.name]
                    continue
                value = content["fields"][field.name]
                if isinstance(value, dict) and "sites" in value:
                    value = {site: arrays[f"{field.name}/{i}"] for i, site in enumerate(value["sites"])}
                values[field.name] = tuple(value) if isinstance(value, list) else _number(value)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path}: not a saved {cls.__name__} ({type(error).__name__}: {error})") from error
        return cls(**values)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self.table().items())

    def table(self) -> dict[str, str]:
        """The numbers over the data set as strings, for printing."""
        raise NotImplementedError


def _saved(cls: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.metadata.get("saved", True)]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over the data and its standard error; NaN for one datum."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def mean_words(values: Tensor | None) -> str:
    """Mean over the data and its standard error, as a string.

    >>> mean_words(torch.tensor([1.0, 3.0]))
    '2.000 ± 1.000'
    """
    return "not known" if values is None else error_words(*mean_and_error(values))


def kind_of(path: Path) -> str:
    """The class name of the result in a JSON file; an empty string for other files."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return ""
    return str(content.get("kind", "")) if isinstance(content, dict) else ""


def _plain(value: Any) -> Any:
    """A JSON value: a non-finite number becomes a string."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


FIELDS = ("log_px", "std_error", "ess", "k_hat", "elbo", "nonfinite")
DERIVED = (
    "nll", "nll_std_error", "bits_per_dim", "unreliable", "num_data", "curve", "summary", "per_datum", "elbo",
)  # fmt: skip


def estimate_file(path: str | os.PathLike[str], name: str = "log_marginal") -> Path:
    """The file of an estimate: itself, `<name>.json` in a folder that `save` wrote, or in `results/` of a run folder.

    >>> estimate_file("log_marginal.json").name
    'log_marginal.json'
    """
    path = Path(path)
    if path.suffix == ".json" and not path.is_dir():
        return path
    saved = path / f"{name}.json"
    return saved if os.path.exists(saved) else path / "results" / f"{name}.json"


def load_estimate(path: str | os.PathLike[str]) -> Estimate:
    """Loads a saved `Estimate`, given its JSON file or folder; bounds, draws, log-likelihoods and ess by step are
    in the NetCDF file.

    Raises:
        CheckpointError: the file is missing, or is no saved estimate.

    >>> import tempfile
    >>> one = torch.ones(30).double()
    >>> values = (-one, 0.1 * one, 90 * one, 0.2 * one, -2 * one, 0 * one)
    >>> est = Estimate(*values, 100, 0, 3, "density", bounds={1: -2 * one})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_estimate(est.save(folder))
    >>> again.table() == est.table(), torch.equal(again.bound(1), est.bound(1))
    (True, True)
    """
    path = estimate_file(path)
    try:
        content = read_result(path)
        rows = {name: _tensor(values) for name, values in content["per_datum"].items()}
        own = {f.name for f in dataclasses.fields(Estimate)}
        plain: dict[str, Any] = {k: v for k, v in content.items() if k in own and k not in DERIVED}
        settings = {k: v for k, v in content.items() if k not in own and k not in (*DERIVED, *ORIGIN)}
        reliable = rows.pop("reliable").bool()
        arrays = _arrays(path.with_suffix(".nc"))
        words = content.get("notes", "")
        plain |= {name: rows.pop(name) for name in FIELDS}
        plain |= {"notes": tuple(words.split("; ")) if words else (), "levels": content.get("levels") or None}
        if "guide_estimate" in plain:
            plain["guide_estimate"] = guide = _guide_estimate(
                path.with_name(plain["guide_estimate"]), content["digest"]
            )
            plain["elbo"] = plain["elbo"] if guide is None else guide.elbo  # files of before have the proposal's
        est = Estimate(**plain, **arrays, settings=settings, diagnostics=rows)
        if est.method in ("importance sampling", MIXED_METHOD) and torch.equal(est.reliable, reliable):
            return est
        return dataclasses.replace(est, reliable_override=reliable)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a saved estimate ({type(error).__name__}: {error})") from error


def _guide_estimate(path: Path, digest: str) -> Estimate | None:
    """The estimate beside another one; None where its file is missing, or was overwritten by one of other data."""
    if not path.exists():
        return None
    est = load_estimate(path)
    return est if est.digest == digest else None


def _tensor(values: list[Any]) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def _arrays(path: Path) -> dict[str, Any]:
    """Bounds per datum, draws, log-likelihoods and ess by step, by field of `Estimate`; {} without a NetCDF file."""
    if not path.exists():
        return {}
    import h5py

    with h5py.File(path) as file:
        own = {name: torch.from_numpy(values[()]) for name, values in file[GROUP].items()}
        bounds = {int(n.removeprefix("bound_")): values for n, values in own.items() if n.startswith("bound_")}
        draws = file.get("posterior", {})  # coordinates have one dim, draws those of chain and draw at least
        latents = {v.attrs.get(SITE, n): torch.from_numpy(v[0]) for n, v in draws.items() if v.ndim > 1}
        given = file.get("log_likelihood", {})
        return {
            "bounds": bounds, "posterior": latents or None, "ess_by_step": own.get(ESS_BY_STEP),
            "log_likelihood": torch.from_numpy(given["x"][0]) if "x" in given else None,
        }  # fmt: skip
