"""One of several processes that train: `python processes_worker.py FOLDER CASE ...`: prints what comes of it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO

from ppvae import fit, nn, objectives
from ppvae.errors import PpvaeError
from ppvae.models import LinearGaussian

FULL = 21
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def linear(full):
    """A pair without noise, z(x) a point: its steps are the same however a batch is divided."""
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(3, 2).double(), torch.nn.Linear(2, 3).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", full or len(x), subsample=x if full else None):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", full or len(x), subsample=x if full else None):
            pyro.sample("z", dist.Delta(encoder(x)).to_event(1))

    return model, guide


def with_batch_norm():
    torch.manual_seed(rank)  # begins with other weights everywhere: the first one's are taken
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4))
    decoder = nn.mlp(2, 3, hidden=(8,))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def failing():
    pair = LinearGaussian(3, 2)

    def guide(x):
        calls.append(torch.is_grad_enabled())
        if rank == 1 and sum(calls) > 6:
            raise ValueError("the second process stumbles")
        pair.mean_field(x)

    calls: list[bool] = []
    return pair.model, guide


def run(case, folder):
    x = torch.randn(FULL, 3, generator=torch.Generator().manual_seed(1))
    common = {"batch_size": 5, "progress": False, "checkpoint_seconds": 0}
    pyro.clear_param_store()
    if case in ("plain", "fixed size"):
        pair = linear(FULL if case == "fixed size" else None)
        return fit(*pair, x.double(), epochs=4, objective=Trace_ELBO(), **common)
    if case == "batch norm":
        return fit(*with_batch_norm(), x, valid=x[:6], epochs=3, patience=2, directory=folder, **common)
    if case in ("whole", "cut", "resumed"):
        torch.manual_seed(0)
        pair = LinearGaussian(3, 2)
        goal = objectives.ELBO(4, gradient="score")
        return fit(
            pair.model, pair.mean_field, x, valid=x, epochs=2 if case == "cut" else 4, objective=goal,
            directory=folder, resume=case == "resumed", **common,
        )  # fmt: skip
    if case == "failing":
        return fit(*failing(), x, epochs=4, **common)
    if case == "unlike":
        pair = LinearGaussian(3, 2)
        return fit(pair.model, pair.mean_field, x, epochs=1, seed=rank, **common)
    raise ValueError(case)


def report(case, folder):
    """What came of a case, by name."""
    try:
        done = run(case, f"{folder}/run")
    except PpvaeError as error:
        return {"error": str(error)}
    params = torch.cat([p.detach().double().flatten() for p in done.model.scope.params.values()])
    digest = hashlib.sha256(params.numpy().tobytes()).hexdigest()
    return {"digest": digest, "params": params.tolist(), "elbo": [m.get("valid_elbo") for m in done.history]}


def thread_names():
    tasks = Path("/proc/self/task")  # Linux alone has it
    return [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else []


if __name__ == "__main__":
    folder, *cases = sys.argv[1:]
    found = {}
    for case in cases:
        if size > 1:
            store, patience = f"file://{folder}/store of {case}", timedelta(seconds=60)
            torch.distributed.init_process_group("gloo", store, timeout=patience, rank=rank, world_size=size)
        try:
            found[case] = report(case, folder)
        finally:
            if size > 1:
                torch.distributed.destroy_process_group()  # or its threads may abort the process as it ends
    found["threads left"] = [name for name in thread_names() if "gloo" in name]
    print(json.dumps(found))
