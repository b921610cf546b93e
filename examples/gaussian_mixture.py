"""A Bayesian mixture of normals: weights and locations are latents of all data, the cluster of a datum is summed out.

python examples/gaussian_mixture.py --epochs 300
"""

import functools
import math

import pyro
import pyro.distributions as dist
import torch
import tyro
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO
from pyro.ops.indexing import Vindex

from ppvae import fit, log_marginal

CLUSTERS = 3


def model(x):
    """p(weights) p(loc) prod_n sum_c weights_c N(x_n; loc_c, 0.5)."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(CLUSTERS)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(CLUSTERS, 2), 3.0).to_event(2))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(Vindex(loc)[..., c, :], 0.5).to_event(1), obs=x)


def guide(x):
    """A Dirichlet and normals, the same for all data."""
    concentration = pyro.param("concentration", torch.full((CLUSTERS,), 10.0), constraint=constraints.positive)
    pyro.sample("weights", dist.Dirichlet(concentration))
    start = x[:: len(x) // CLUSTERS][:CLUSTERS].clone()
    loc = pyro.param("loc_loc", start)
    scale = pyro.param("loc_scale", torch.full((CLUSTERS, 2), 0.1), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(loc, scale).to_event(2))


def main(epochs: int = 300, count: int = 150, particles: int = 2000, seed: int = 0) -> float:
    """Returns log p(all data): weights are latents of all data, so that there is one number for the data set."""
    torch.manual_seed(seed)
    centres = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.5]])
    x = centres[torch.arange(count) * CLUSTERS // count] + 0.5 * torch.randn(count, 2)
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    adam = functools.partial(torch.optim.Adam, lr=0.03)
    run = fit(model, guide, x, objective=objective, optimizer=adam, epochs=epochs, batch_size=count, seed=seed)
    est = log_marginal(run.model, run.guide, x, num_particles=particles, seed=seed)
    print(est.summary())
    orders = math.factorial(CLUSTERS)  # clusters may change places: as many modes, of which the guide knows one
    print(f"log p(all data) of all {orders} orders of the clusters: {float(est.log_px) + math.log(orders):.1f}")
    return float(est.log_px)


if __name__ == "__main__":
    tyro.cli(main)
