"""Rows of which nothing is observed, in every form that data have."""

import math

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import check, data, fit, log_marginal
from ppvae.errors import DataError

NAN = math.nan


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


FRAME = pd.DataFrame({"a": [1.0, NAN, 0.5, NAN, 2.0], "b": [NAN, NAN, 1.5, NAN, 1.0]}).astype("float32")
FORMS = {
    "frame": (lambda f: f, lambda f: f.dropna(how="all"), "frame.dropna(how='all')"),
    "dict": (lambda f: {n: f[n] for n in f}, lambda f: f.dropna(how="all"), "frame.dropna(how='all') before"),
    "tuple": (lambda f: tuple(torch.tensor(f[n].values) for n in f), lambda f: f.dropna(how="all"), "dropna"),
    "tensor": (lambda f: torch.tensor(f.values), None, "x[~x.isnan().flatten(1).all(1)]"),
    "vector": (lambda f: torch.tensor(f["a"].values), None, "x[~x.isnan()]"),
}


@pytest.mark.parametrize("use", ["fit", "log_marginal", "check"])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_observed_values_is_refused_in_every_form_of_data(form, use):
    """By its number, and with a cure that works when it is followed."""
    make, drop, words = FORMS[form]
    scale = torch.tensor([1.0, 2.0])

    def model(*batch):
        x = batch[0] if batch[0].dim() > 1 else torch.stack(batch, -1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            fn = dist.Normal(z, scale[: x.shape[1]]).mask(~x.isnan()).to_event(1)
            pyro.sample("x", fn, obs=x.nan_to_num())

    def guide(*batch):
        with pyro.plate("data", len(batch[0])):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(1)), 1.0).to_event(1))

    def two(a, b):
        model(a, b)

    def run(x):
        pair = (two, lambda a, b: guide(a, b)) if form in ("dict", "tuple") else (model, guide)
        options = {"fit": {"epochs": 1}, "log_marginal": {"num_particles": 30, "proposal": "guide"}, "check": {}}[use]
        return {"fit": fit, "log_marginal": log_marginal, "check": check}[use](*pair, x, **options)

    if use == "log_marginal":
        model(torch.zeros(1, 2)), guide(torch.zeros(1, 2))
    with pytest.raises(DataError, match="row 1 has no value that is not missing, nor has it for 1 more row") as error:
        run(data.with_missing(make(FRAME)))
    assert words in str(error.value)
    x = make(FRAME) if drop is None else make(drop(FRAME))
    if form == "tensor":
        x = x[~x.isnan().flatten(1).all(1)]
    if form == "vector":
        x = x[~x.isnan()]
    run(data.with_missing(x))
