"""Results as an ArviZ object and as NetCDF, under ArviZ 0.20 and later and under ArviZ 1.x.

ArviZ 0.x holds groups in an `InferenceData`, 1.x in an `xarray.DataTree`; both are made here from the same xarray data
sets, so that names, dimensions and files agree. ArviZ takes seconds to import, so that it is imported on first use.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppvae.errors import UsageError
from ppvae.storage import replace_file

DIMENSIONS = ("chain", "draw", "datum")
SITE = "site"  # the attribute of a variable that has another name than its site
ESS_BY_STEP = "ess_by_step"
GROUP = "marginal_likelihood"  # not one of ArviZ's own: its sample_stats would need a chain and a draw for every value


def to_arviz(
    per_datum: Mapping[str, Any],
    posterior: Mapping[str, Any] | None = None,
    observed: Any = None,
    attrs: Mapping[str, Any] | None = None,
    log_likelihood: Any = None,
    ess_by_step: Any = None,
    site: str = "x",
) -> Any:
    """One `InferenceData` (ArviZ 0.x) or `DataTree` (1.x) that holds results per datum, and if given draws and data.

    Args:
        per_datum: name -> [N], such as log_px in nats; group `marginal_likelihood`, dimension `datum`.
        posterior: latent's name -> [draws, N, *event]; group `posterior`, dimensions `chain` (1), `draw`, `datum`, and
            `<name>_dim_<i>` for the event, as ArviZ names them. A site whose name NetCDF does not take, as "a/z", or
            that is the name of a dimension, has another, and its own as the attribute `site`.
        observed: [N, *event]; variable `site` of group `observed_data`.
        log_likelihood: [draws, N], of each datum at each draw of the global latents, which `posterior` then holds,
            [draws, *event]; variable `site` of group `log_likelihood`, as `arviz.loo` takes it.
        ess_by_step: [N, T], of particle filters; with the results per datum, dimensions `datum` and `step`.
        site: the observed site.
        attrs: strings and numbers about the whole. A bool becomes 0 or 1, since NetCDF has no such attribute; anything
            else becomes its `str`.

    Raises:
        UsageError: an array has too few dimensions, or its N (or number of draws) is not that of the others.

    >>> tree = to_arviz({"log_px": np.array([-1.5, -2.0])}, {"z": np.zeros((4, 2, 3))}, attrs={"num_particles": 5000})
    >>> tree["posterior"]["z"].dims, tree["marginal_likelihood"]["log_px"].dims, tree.attrs["num_particles"]
    (('chain', 'draw', 'datum', 'z_dim_0'), ('datum',), 5000)
    """
    variables, data = variable_names(posterior or {}), variable_names([site])[site]
    dims = ("draw", "datum") if log_likelihood is None else ("draw",)
    arrays = {
        GROUP: {name: _array(name, values, ("datum",), event=False) for name, values in per_datum.items()},
        "posterior": {
            variables[site]: _array(variables[site], draws, dims) for site, draws in (posterior or {}).items()
        },
        "log_likelihood": {} if log_likelihood is None else {data: _array(data, log_likelihood, ("draw", "datum"))},
        "observed_data": {} if observed is None else {data: _array(data, observed, ("datum",))},
    }
    if ess_by_step is not None:
        arrays[GROUP][ESS_BY_STEP] = _array(ESS_BY_STEP, ess_by_step, ("datum", "step"), event=False)
    _same_sizes(arrays)
    groups = {group: _dataset(group, held) for group, held in arrays.items() if held}
    for site, variable in variables.items():
        if variable != site:
            groups["posterior"][variable].attrs[SITE] = site
    return _tree(groups, {name: _attribute(value) for name, value in (attrs or {}).items()})


def predictive_to_arviz(attrs: Mapping[str, Any] | None = None, **groups: Mapping[str, Any]) -> Any:
    """Groups of a predictive check, by the names that ArviZ gives them: `posterior_predictive`, `log_likelihood`, ...

    `groups` are {name: [draws, N, *event]}, of `observed_data` {name: [N, *event]}; every group has draws of its own,
    and an empty one is left out.

    >>> tree = predictive_to_arviz(observed_data={"x": np.zeros((3, 2))}, prior_predictive={"x": np.zeros((9, 3, 2))})
    >>> tree["prior_predictive"]["x"].dims
    ('chain', 'draw', 'datum', 'x_dim_0')
    """
    made, attributes = {}, {name: _attribute(value) for name, value in (attrs or {}).items()}
    for group, held in groups.items():
        variables = variable_names(held)
        dims = ("datum",) if group == "observed_data" else ("draw", "datum")
        arrays = {variables[name]: _array(variables[name], values, dims) for name, values in held.items()}
        _same_sizes({group: arrays})
        if arrays:
            made[group] = _dataset(group, arrays)
        for name in (name for name, variable in variables.items() if variable != name):
            made[group][variables[name]].attrs[SITE] = name
    return _tree(made, attributes)


def arrays_to_arviz(group: str, arrays: Mapping[str, Any], attrs: Mapping[str, Any] | None = None) -> Any:
    """A result that is no estimate: all of its arrays in one group, as `InferenceData` or `DataTree`.

    Args:
        group: its name.
        arrays: by name; those as long as the first of them have dimension `datum`, and all others, as well as arrays of
            one site ("kl/z"), dimensions of their own.
        attrs: as for `to_arviz`.

    >>> tree = arrays_to_arviz("gaps", {"elbo": np.zeros(5), "kl/z": np.zeros(3)})
    >>> tree["gaps"]["elbo"].dims, tree["gaps"]["kl_z"].dims
    (('datum',), ('kl_z_dim_0',))
    """
    import xarray

    count, variables, plain_names = None, {}, variable_names(arrays)
    for name, values in arrays.items():
        values, plain = np.asarray(values), plain_names[name]
        dims = [f"{plain}_dim_{i}" for i in range(values.ndim)]
        if "/" not in name and values.ndim and count in (None, len(values)):
            count, dims[0] = len(values), "datum"
        variables[plain] = (dims, values)
    return _tree({group: xarray.Dataset(variables)}, {name: _attribute(value) for name, value in (attrs or {}).items()})


def write_netcdf(tree: Any, path: str | os.PathLike[str]) -> Path:
    """Write what `to_arviz` gives to a NetCDF file, whole or not at all, and return its path.

    `arviz.from_netcdf(path)` reads it back. Booleans come back as booleans: they are stored as bytes that xarray marks.

        >>> import tempfile, arviz
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_netcdf(to_arviz({"reliable": np.array([True, False])}), Path(folder, "result.nc"))
        ...     arviz.from_netcdf(path)["marginal_likelihood"]["reliable"].values
        array([ True, False])
    """
    path = Path(path)
    # ppvae installs no other engine, and ArviZ 1.x would look for netCDF4
    replace_file(path, lambda partial: tree.to_netcdf(str(partial), engine="h5netcdf"))
    return path


def variable_names(sites: Iterable[str]) -> dict[str, str]:
    """A variable's name for each site, as NetCDF takes them: without "/", and none of them twice or a dimension's.

    >>> variable_names(["z", "a/z", "a_z", "datum"])
    {'z': 'z', 'a/z': 'a_z', 'a_z': 'a_z_', 'datum': 'datum_'}
    """
    names: dict[str, str] = {}
    taken = set(DIMENSIONS)
    for site in sites:
        name = re.sub(r"_dim_(?=\d+$)", "_dim__", site.replace("/", "_"))
        while name in taken:
            name += "_"
        taken.add(name)
        names[site] = name
    return names


_Array = tuple[tuple[str, ...], np.ndarray]  # dimensions and values, as xarray takes them


def _array(name: str, values: Any, dims: tuple[str, ...], event: bool = True) -> _Array:
    values = np.asarray(values)
    extra = values.ndim - len(dims)
    if extra < 0 or (extra and not event):
        expected = ", ".join((*dims, "*event") if event else dims)
        raise UsageError(f"to_arviz: {name!r} should have shape [{expected}]; found {list(values.shape)}")
    return (*dims, *(f"{name}_dim_{i}" for i in range(extra))), values


def _same_sizes(arrays: Mapping[str, Mapping[str, _Array]]) -> None:
    """xarray would let two groups differ, and 'datum' would not mean the same thing in both."""
    sizes: dict[str, tuple[int, str]] = {}
    for group, variables in arrays.items():
        for name, (dims, values) in variables.items():
            for dim, size in zip(dims, values.shape, strict=True):
                known, owner = sizes.setdefault(dim, (size, f"{group}/{name}"))
                if size != known:
                    raise UsageError(
                        f"to_arviz: {group}/{name} has {size} along {dim!r} where {owner} has {known}; "
                        "were they made from the same data?"
                    )


def _dataset(group: str, arrays: Mapping[str, _Array]) -> Any:
    import xarray

    if group not in (GROUP, "observed_data"):
        arrays = {name: (("chain", *dims), values[None]) for name, (dims, values) in arrays.items()}
    sizes = {dim: size for dims, values in arrays.values() for dim, size in zip(dims, values.shape, strict=True)}
    return xarray.Dataset(dict(arrays), coords={dim: np.arange(size) for dim, size in sizes.items()})


def _attribute(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return int(value)
    return value if isinstance(value, str | int | float | np.integer | np.floating) else str(value)


def _tree(groups: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    import arviz as az  # the package: imports are absolute, whatever this module is called

    if int(az.__version__.split(".")[0]) == 0:
        return az.InferenceData(attrs=dict(attrs), **groups)
    import xarray

    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=dict(attrs)), **groups})
