"""`ppvae new NAME`: writes a pair to start from, with a test, and says which three commands to run."""

import importlib.util
import keyword
from pathlib import Path

from ppvae.cli.flags import HelpShown
from ppvae.errors import UsageError
from ppvae.storage import write_bytes

MAX_NAME = 200  # bytes; file systems take 255
HELP = """usage: ppvae new NAME

Writes NAME.py, a factory of a model and a guide to start from, and test_NAME.py, its test, into the current folder,
and prints the three commands that test, train and evaluate it. Files that exist are never replaced."""

PAIR = '''"""A model and a guide on flat binary data, as plain Pyro functions: start here, and change what you like."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


def {name}(train: torch.Tensor, latent: int = 8, hidden: int = 200):
    """p(x, z) = N(z; 0, I) Bernoulli(x; decoder(z)), and q(z | x) = N(z; loc(x), diag(scale(x)^2)).

    Args:
        train: the training data [N, features], which the command line passes.
        latent: the size of z.
        hidden: the width of the networks.
    """
    features = train.shape[1]
    decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, features))
    encoder = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide
'''

TEST = '''"""The pair of {name}.py keeps the contract, trains, and has a log p(x)."""

import torch
from {name} import {name}

import ppvae


def test_it_trains_and_has_a_log_px():
    torch.manual_seed(0)
    x = (torch.rand(60, 12) < 0.5).float()
    model, guide = {name}(x, latent=2, hidden=16)
    print(ppvae.check(model, guide, x))
    run = ppvae.fit(model, guide, x, epochs=2, seed=0)
    est = ppvae.log_marginal(run.model, run.guide, x, num_particles=200, proposal="refined")
    assert est.log_px.isfinite().all()
    assert (est.elbo - est.log_px).mean() < 0  # the ELBO is a lower bound
'''


def run(args: list[str]) -> int:
    """Writes the two files and prints the commands; returns the exit status."""
    if {"-h", "--help"} & set(args):
        print(HELP)
        raise HelpShown
    if len(args) != 1:
        raise UsageError(f"ppvae new: expected a name, as in `ppvae new my_pair`; found {' '.join(args) or 'nothing'}")
    name = args[0].removesuffix(".py")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f"ppvae new: expected a name of a Python module, such as my_pair; found {args[0]!r}")
    if len(name.encode()) > MAX_NAME:
        raise UsageError(f"ppvae new: expected a name of at most {MAX_NAME} bytes, found one of {len(name.encode())}")
    files = {Path(f"{name}.py"): PAIR, Path(f"test_{name}.py"): TEST}
    for path in files:
        if path.exists():
            raise UsageError(f"ppvae new: expected no file {path}, found one; give another name, or remove it")
    if name.startswith("__") or importlib.util.find_spec(name) is not None:
        raise UsageError(
            f"ppvae new: expected a name that no module has, found {name!r}: its file would hide the module"
        )
    for path, text in files.items():
        write_bytes(path, text.format(name=name).encode())
        print(f"wrote {path}")
    print("now:")
    for command in commands(name):
        print(f"  {command}")
    return 0


def commands(name: str) -> tuple[str, str, str]:
    """The commands that test, train and evaluate the pair."""
    return (f"python -m pytest test_{name}.py", f"ppvae fit {name}.py --name {name}", f"ppvae evaluate runs/{name}")
