"""Tables with gaps against the plain VAE, the table without its masked columns, and linear algebra."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest
import torch
from torch import Tensor

from ppvae import VAE, check, data, fit, likelihoods, log_marginal, posteriors, terms
from ppvae.errors import DataError
from ppvae.evaluation import impute
from ppvae.models import TableVAE

pytestmark = pytest.mark.usefixtures("float64")
COLUMNS = ["real", "count", "binary", ("categorical", 3)]
NAN = math.nan


def table(rows: int = 8) -> Tensor:
    return torch.stack(
        [
            torch.randn(rows),
            torch.poisson(torch.full((rows,), 3.0)),
            torch.arange(rows) % 2.0,
            torch.arange(rows) % 3.0,
        ],
        -1,
    )


def gappy(x: Tensor) -> Tensor:
    gaps = torch.rand(x.shape) < 0.3
    gaps[torch.arange(len(x)), torch.arange(len(x)) % x.shape[1]] = False
    return x.masked_fill(gaps, NAN)


def test_nothing_missing_is_the_plain_vae():
    pair, x = TableVAE.from_data(table(), COLUMNS, latent=2, hidden=(5,)), table()

    class Seen(torch.nn.Module):
        """What the encoder sees of a row without gaps."""

        def __init__(self, net: torch.nn.Module):
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            unit = (x - pair.posterior.net.centre) / pair.posterior.net.spread
            return self.net(torch.cat([unit, torch.ones_like(unit)], -1))

    plain = VAE(pair.prior, pair.likelihood, posteriors.DiagonalNormal(Seen(pair.posterior.net.net.net)))
    t = terms(pair.model, pair.guide, x, 4)
    other = terms(plain.model, plain.guide, x, 4, values={"z": t.guide["z"].value})
    torch.testing.assert_close(other.log_weight, t.log_weight)


@pytest.mark.parametrize("column", range(4))
def test_dropping_a_masked_column_changes_nothing(column):
    """A column that is missing everywhere, and the table without it: the same model of what is observed."""
    pair, x = TableVAE.from_data(table(), COLUMNS, latent=2, hidden=(5,)), gappy(table())
    x[:, (column + 1) % 4] = table()[:, (column + 1) % 4]  # something is left in each row
    x[:, column] = NAN
    kept = [d for d in range(4) if d != column]
    fewer = TableVAE([COLUMNS[d] for d in kept], latent=2, hidden=(5,))
    places = [range(1), range(1, 2), range(2, 3), range(3, 6)]
    rows = torch.tensor([i for d in kept for i in places[d]])
    encoder, decoder = pair.posterior.net, pair.likelihood.net
    with torch.no_grad():
        for name in ("centre", "spread"):
            getattr(fewer.posterior.net, name).copy_(getattr(encoder, name)[kept])
        fewer.posterior.net.net.net.load_state_dict({
            k: v[:, kept + [d + 4 for d in kept]] if k == "0.weight" else v
            for k, v in encoder.net.net.state_dict().items()
        })  # fmt: skip
        fewer.likelihood.net.load_state_dict({
            k: v[rows] if k.startswith("2.") else v for k, v in decoder.state_dict().items()
        })  # fmt: skip
        fewer.likelihood.log_scale.copy_(pair.likelihood.log_scale[: len(fewer.likelihood.log_scale)])
    t = terms(pair.model, pair.guide, x, 4)
    other = terms(fewer.model, fewer.guide, x[:, kept], 4, values={"z": t.guide["z"].value})
    torch.testing.assert_close(other.log_weight, t.log_weight)


def linear(columns: int = 4) -> TableVAE:
    """z ~ N(0, I), x | z ~ N(W z + b, diag(s)^2): everything is known."""
    pair = TableVAE(["real"] * columns, latent=2, hidden=(), floor=1e-9)
    with torch.no_grad():
        pair.likelihood.log_scale.copy_(torch.linspace(-0.5, 0.5, columns))
        pair.posterior.net.net.net[0].weight.zero_()
        pair.posterior.net.net.net[0].bias[2:] = 0.2  # wider than the prior: the weights are bounded
    return pair


def moments(pair: TableVAE) -> tuple[Tensor, Tensor]:
    net, scale = pair.likelihood.net[0], pair.likelihood.log_scale.exp() + pair.likelihood.floor
    return net.bias.detach(), (net.weight @ net.weight.T + torch.diag(scale**2)).detach()


def test_log_px_and_imputations_of_a_linear_table_are_linear_algebra():
    pair, x = linear(), gappy(torch.randn(8, 4))
    loc, cov = moments(pair)
    exact, filled = torch.empty(len(x)), x.clone()
    for i, row in enumerate(x):
        o, m = ~row.isnan(), row.isnan()
        exact[i] = torch.distributions.MultivariateNormal(loc[o], cov[o][:, o]).log_prob(row[o])
        filled[i, m] = loc[m] + cov[m][:, o] @ torch.linalg.solve(cov[o][:, o], row[o] - loc[o])
    marked = data.with_missing(x)
    est = log_marginal(pair.model, pair.guide, marked, num_particles=6000, seed=1, progress=False, proposal="guide")
    assert bool(est.reliable.all())
    assert bool(((est.log_px - exact).abs() < 4 * est.std_error).all())  # fails once in 2000
    assert bool((est.std_error < 0.03).all())
    found = impute(pair.model, pair.guide, marked, num_particles=6000, seed=1)
    assert float((found.mean - filled).abs().max()) < 0.1  # a mean of 2000 draws or more: five standard errors


def test_it_starts_at_the_columns_own_distributions_and_standardises():
    x = gappy(table(30))
    pair = TableVAE.from_data(x, COLUMNS, latent=2, hidden=())
    with torch.no_grad():
        pair.likelihood.net[0].weight.zero_()
    mean = pair.likelihood(torch.zeros(1, 2)).mean[0]
    torch.testing.assert_close(mean[:2].detach(), x.nanmean(0)[:2])
    ones = (x[:, 2] == 1).sum()
    torch.testing.assert_close(mean[2].detach(), (ones + 1.0) / ((~x[:, 2].isnan()).sum() + 2))
    codes = torch.stack([(x[:, 3] == k).sum() + 1.0 for k in range(3)])
    torch.testing.assert_close(pair.likelihood.net[0].bias[3:].softmax(-1).detach(), codes / codes.sum())
    pair.posterior.net.net = torch.nn.Identity()
    seen = pair.posterior.net(x)
    torch.testing.assert_close(seen.nanmean(0), torch.zeros(4), atol=1e-12, rtol=0)
    torch.testing.assert_close(seen.square().nanmean(0), torch.ones(4))


# -- what is refused --------------------------------------------------------------------------------------------------

WRONG = {1: -1.0, 2: 0.5, 3: 3.0}
USES = {
    "check": lambda p, x: check(p.model, p.guide, x),
    "fit": lambda p, x: fit(p.model, p.guide, x, epochs=1, batch_size=8, progress=False),
    "log_marginal": lambda p, x: log_marginal(p.model, p.guide, x, num_particles=2, progress=False, proposal="guide"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("column", WRONG)
def test_a_value_that_does_not_fit_its_column_is_refused_by_row_and_column(use, column):
    x = gappy(table())
    x[5, column] = WRONG[column]
    with pytest.raises(DataError, match=rf"takes values in its columns .* at row ., position \[{column}\]"):
        USES[use](TableVAE(COLUMNS), data.with_missing(x))
    kind = rf"column {column}: expected values of a {COLUMNS[column] if column < 3 else 'categorical'} column"
    with pytest.raises(DataError, match=f"{kind}, found {WRONG[column]:g} at row 5"):
        TableVAE.from_data(x, COLUMNS)


def test_a_row_or_a_column_with_nothing_observed_is_refused():
    x = table()
    x[6] = NAN
    for use in ("fit", "log_marginal"):
        with pytest.raises(DataError, match="row 6 has no value that is not missing"):
            USES[use](TableVAE(COLUMNS), data.with_missing(x))
    x = table()
    x[:, 2] = NAN
    with pytest.raises(DataError, match="column 2: expected observed values, found none"):
        TableVAE.from_data(x, COLUMNS)
    with pytest.raises(DataError, match=r"x: expected rows \[N, 4\] of 4 columns, found \[8, 3\]"):
        likelihoods.marginals(COLUMNS, x[:, :3])


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("first", [0, 10], ids=["numbered rows", "other index"])
def test_the_cures_of_text_in_a_table_end_in_a_run(gaps, first):
    """Each cure is run as it is written, until no message is left."""
    words = ["south", "north", None if gaps else "west", "west", "north", "south"]
    frame = pd.DataFrame({"age": torch.randn(6).float().numpy(), "region": words, "sex": list("fmfmff")})
    frame.index = range(first, first + 6)
    pair = TableVAE(["real", ("categorical", 3), ("categorical", 2)], latent=2, hidden=(5,)).float()
    followed, take = [], frame
    for _ in range(5):
        try:
            fit(pair.model, pair.guide, take, epochs=1)
            break
        except DataError as error:
            text = str(error)
            followed.append(text)
        if "data.with_missing(x)" in text:
            take = data.with_missing(take)
        else:
            name, cure = re.search(r"column '(\w+)' holds .* as by (.*?)(, where|$)", text).groups()[:2]
            frame[name] = eval(cure, {"pandas": pd, "x": frame[name]})
    else:
        pytest.fail("\n".join(followed))
    assert len(followed) == (3 if gaps else 2)
    assert frame["region"].isna().sum() == gaps
    assert sorted(frame["region"].dropna().unique()) == [0.0, 1.0, 2.0]


def test_a_column_without_observed_values_is_said_once(caplog):
    """As where a Series of another index was assigned to a table."""
    frame = pd.DataFrame(
        {"age": torch.randn(6).float().numpy(), "visits": [1.0, 0.0, 3.0, 2.0, 1.0, 1.0]}, range(10, 16)
    )
    pair = TableVAE(["real", "count"], latent=2, hidden=(5,)).float()
    for taken, said in ((frame, 0), (frame.assign(visits=pd.Series([1.0] * 6)), 1)):
        caplog.clear()
        fit(pair.model, pair.guide, data.with_missing(taken.astype("float32")), epochs=1)
        found = [r.getMessage() for r in caplog.records if "1 column ('visits'): nothing is learned" in r.getMessage()]
        assert len(found) == said
