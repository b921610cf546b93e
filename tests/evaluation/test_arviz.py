"""Export to ArviZ of either major, there and back through NetCDF."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae.errors import UsageError
from ppvae.evaluation import calibration, gaps, load_estimate, log_marginal, representation
from ppvae.evaluation.arviz import GROUP, to_arviz, write_netcdf
from ppvae.models import LinearGaussian

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # 0.23 warns of 1.0 on import
    az = pytest.importorskip("arviz")

N, DRAWS = 5, 7
RNG = np.random.default_rng(0)
PER_DATUM = {
    "log_px": RNG.normal(size=N) - 90,
    "std_error": np.array([0.1, np.nan, 0.2, 0.1, 0.3]),
    "ess": RNG.uniform(1, 100, size=N).astype(np.float32),
    "k_hat": np.array([0.2, np.nan, np.inf, -np.inf, 0.9]),
    "reliable": np.array([True, False, False, True, False]),
    "elbo": RNG.normal(size=N) - 95,
}
POSTERIOR = {"z": RNG.normal(size=(DRAWS, N, 3)).astype(np.float32), "y": RNG.integers(0, 9, size=(DRAWS, N))}
OBSERVED = RNG.uniform(size=(N, 2, 4)).astype(np.float32)
ATTRS = {
    "name": "digits, binarised at seed 0 — été",
    "num_particles": 5000,
    "nll": 91.25,
    "seed": 2**63 + 5,
    "empty": "",
    "steps": np.int64(3),
}


@pytest.fixture
def tree():
    return to_arviz(PER_DATUM, POSTERIOR, OBSERVED, ATTRS)


def read(path):
    """The tree of a file, loaded, with the file closed."""
    tree = az.from_netcdf(path)
    for group in names(tree):
        tree[group].load()
        tree[group].close()
    return tree


def names(tree):
    return set(tree.groups() if callable(tree.groups) else (group.strip("/") for group in tree.groups if group != "/"))


@pytest.mark.parametrize("written", [False, True], ids=["in memory", "through NetCDF"])
def test_values_dims_and_attributes(tree, written, tmp_path):
    if written:
        tree = read(write_netcdf(tree, tmp_path / "result.nc"))
    assert names(tree) == {GROUP, "posterior", "observed_data"}
    for name, values in PER_DATUM.items():
        assert tree[GROUP][name].dims == ("datum",)
        assert tree[GROUP][name].dtype == values.dtype  # a boolean comes back as a boolean
        np.testing.assert_array_equal(tree[GROUP][name], values)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "datum", "z_dim_0")
    assert tree["posterior"]["y"].dims == ("chain", "draw", "datum")
    for name, draws in POSTERIOR.items():
        np.testing.assert_array_equal(tree["posterior"][name], draws[None])
    assert tree["observed_data"]["x"].dims == ("datum", "x_dim_0", "x_dim_1")
    np.testing.assert_array_equal(tree["observed_data"]["x"], OBSERVED)
    np.testing.assert_array_equal(tree["posterior"]["datum"], np.arange(N))
    assert {name: tree.attrs[name] for name in ATTRS} == ATTRS


def test_results_alone(tmp_path):
    tree = read(write_netcdf(to_arviz({"log_px": np.zeros(3)}, None, None, {}), str(tmp_path / "result.nc")))
    assert names(tree) == {GROUP}
    assert not tree.attrs


def test_arviz_reads_the_posterior(tree):
    summary = az.summary(tree, var_names=["z"], kind="stats")
    assert len(summary) == N * 3
    np.testing.assert_allclose(summary["mean"].astype(float), POSTERIOR["z"].mean(0).ravel(), atol=6e-3)


def test_attributes_that_netcdf_cannot_hold(tmp_path):
    attrs = {"finished": True, "binarize": None, "shape": (2, 4)}
    tree = read(write_netcdf(to_arviz(PER_DATUM, attrs=attrs), tmp_path / "result.nc"))
    assert dict(tree.attrs) == {"finished": 1, "binarize": "None", "shape": "(2, 4)"}


def test_torch_tensors_are_taken():
    torch = pytest.importorskip("torch")
    tree = to_arviz({"log_px": torch.arange(3.0)}, {"z": torch.ones(2, 3, 1)}, torch.zeros(3, 4))
    np.testing.assert_array_equal(tree[GROUP]["log_px"], [0, 1, 2])
    assert tree["posterior"]["z"].shape == (1, 2, 3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"log_px": np.zeros((3, 2))},), r"'log_px' should have shape \[datum\]; found \[3, 2\]"),
        (({"log_px": np.float64(1)},), r"'log_px' should have shape \[datum\]; found \[\]"),
        (({}, {"z": np.zeros(3)}), r"'z' should have shape \[draw, datum, \*event\]; found \[3\]"),
        (({"log_px": np.zeros(3)}, {"z": np.zeros((7, 4))}), r"posterior/z has 4 along 'datum' where .*log_px has 3"),
        (({"log_px": np.zeros(3)}, None, np.zeros((4, 2))), r"observed_data/x has 4 along 'datum'"),
        (({}, {"z": np.zeros((7, 3)), "y": np.zeros((6, 3))}), r"posterior/y has 6 along 'draw'"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        to_arviz(*arguments)


class Broken:
    """Writes half of a file and fails, as on a full disk."""

    def to_netcdf(self, path, engine):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")


def test_a_failed_write_leaves_the_old_file(tree, tmp_path):
    path = write_netcdf(tree, tmp_path / "result.nc")
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space"):
        write_netcdf(Broken(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writes_over_the_file_it_was_read_from(tree, tmp_path):
    path = write_netcdf(tree, tmp_path / "result.nc")
    lazy = az.from_netcdf(path)  # its values are still in the file
    write_netcdf(lazy, path)
    np.testing.assert_array_equal(read(path)[GROUP]["log_px"], PER_DATUM["log_px"])


def test_every_saved_result_is_there_for_arviz(tmp_path):
    pair, x = LinearGaussian(3, 2), torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    made = {
        "gaps": gaps(pair.model, pair.mean_field, x[:4], steps=2, rounds=1, num_particles=30),
        "representation": representation(pair.model, pair.mean_field, x),
        "calibration": calibration(pair.model, pair.mean_field, x, replications=100),
    }
    for name, result in made.items():
        tree = az.from_netcdf(result.save(tmp_path, name).with_suffix(".nc"))
        assert tree[name].data_vars
        assert all(np.isfinite(v.values[v.values == v.values]).all() for v in tree[name].data_vars.values())
    elbo = az.from_netcdf(tmp_path / "gaps.nc")["gaps"]["elbo"]
    assert elbo.dims == ("datum",)
    assert np.array_equal(elbo.values, made["gaps"].elbo.numpy())


# Names of sites


NAMES = ["z", "a/z", "a_z", "datum", "draw", "chain", "z_dim_0", "log_px", "x/", "site"]


@pytest.mark.parametrize("names", [[name] for name in NAMES] + [NAMES], ids=lambda names: " ".join(names))
def test_every_name_of_a_site_is_saved_and_read_back(names, tmp_path):
    def model(x):
        with pyro.plate("data", len(x)):
            latents = [pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1)) for name in names]
            pyro.sample("x", dist.Normal(sum(latents).sum(-1), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for name in names:
                pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))

    est = log_marginal(model, guide, torch.randn(6), num_particles=50, posterior_draws=4, proposal="guide")
    again = load_estimate(est.save(tmp_path))
    assert set(again.posterior) == set(names)
    for name in names:
        assert torch.equal(again.posterior[name], est.posterior[name])
    assert again.table() == est.table()
