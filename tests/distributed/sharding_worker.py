"""What test_sharding runs in two processes and in one: `python sharding_worker.py RANK SIZE STORE OUT`."""

import sys
from datetime import timedelta

import numpy as np
import torch
from torch import distributed

from ppvae import log_marginal
from ppvae.errors import PpvaeError
from ppvae.evaluation import annealed, bdmc, calibration, gaps
from ppvae.evaluation.annealing import hmc
from ppvae.models import LinearGaussian


def oracle(count):
    torch.manual_seed(1)
    pair = LinearGaussian(6, 2, 0.5).requires_grad_(False)
    return pair, 2 * torch.randn(count, 6)


def methods(directory=None):
    """{name: results by name}: three blocks of data, of which the last is short, or one, for two processes."""
    pair, x = oracle(130)
    both, short = (pair.model, pair.mean_field), {"num_chains": 3, "num_temperatures": 4, "num_leapfrog": 2}
    words = {"num_particles": 150, "seed": 3, "proposal": "guide"}
    out = {
        "log_marginal": of_estimate(log_marginal(*both, x, posterior_draws=2, directory=directory, **words)),
        "one block": of_estimate(log_marginal(*both, x[:7], **words)),
        "auto": of_estimate(log_marginal(*both, x, num_particles="auto", max_particles=800, seed=3, proposal="guide")),
        "annealed": of_estimate(annealed(*both, x, **short)),
        "smc": of_estimate(annealed(*both, x, resample=0.9, **short)),
    }
    bracket = bdmc(*both, x, **short)
    out["bdmc"] = {"lower": bracket.lower, "upper": bracket.upper, "data": bracket.data[0]}
    found = gaps(*both, x[:60], steps=2, rounds=1, num_particles=20)
    out["gaps"] = {"log_px": found.log_px, "best": found.best_elbo, "richer": found.richer_elbo}
    ranks = calibration(*both, x, replications=170, num_draws=9)
    out["calibration"] = {"ranks": ranks.ranks["z"], "p": ranks.p_values["z"]}
    return out


def of_estimate(est):
    drawn = {f"drawn {name}": value for name, value in (est.posterior or {}).items()}
    return est.per_datum() | {f"bound {k}": value for k, value in est.bounds.items()} | drawn


def errors(rank):
    """{what goes wrong on the second process: the error of this one}."""
    pair, x = oracle(130)
    broken = oracle(130)[0]

    def model(x):
        if rank == 1 and "blocks" in state:
            raise RuntimeError("the moon is full")
        return broken.model(x)

    state, out = [], {}
    data = x.clone()
    data[3, 2] = torch.nan if rank == 1 else 0.0
    with torch.no_grad():
        other = oracle(130)[0]
        other.loc.add_(float(rank))
    for name, model_of, guide, of in (
        ("data", pair.model, pair.mean_field, data),
        ("parameters", other.model, other.mean_field, x),
        ("block", model, broken.mean_field, x),
    ):
        state += ["blocks"] if name == "block" else []
        try:
            log_marginal(model_of, guide, of, num_particles=20, proposal="guide")
        except (PpvaeError, RuntimeError) as error:
            out[name] = f"{type(error).__name__}: {error}"
    out["after"] = str(len(log_marginal(pair.model, pair.mean_field, x, num_particles=20, proposal="guide").log_px))
    return out


def main():
    rank, size, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_default_dtype(torch.float64)
    hmc.WARM_UP_TRANSITIONS, hmc.MIN_PILOT_TRANSITIONS = 8, 1
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=300)
    )
    found = methods(f"{out}.blocks")
    arrays = {f"{name}/{key}": value.numpy() for name, part in found.items() for key, value in part.items()}
    np.savez(f"{out}.{rank}.npz", **arrays)
    np.savez(f"{out}.{rank}.errors.npz", **errors(rank))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
