"""Is "reliable" reliable? Posteriors whose log p(x) is known, and of the data called reliable the share that is off.

The data do not depend on the latents, so that log p(x) is that of a standard normal, the posterior is the prior, and
the guide errs on it as guides do: ridges under a mean-field guide (one of the conditional scales and one of the
marginal ones), heavy tails, funnels, skewness, two modes of which the guide is broad enough for both, a discrete
latent beside a continuous one, and good guides, whose data should stay reliable. Every datum is a replica with noise
of its own. "Off" is the share of reliable data whose estimate is more than five of its standard errors from the
truth, and z the mean error in standard errors. The last row is a mode that nothing proposes: no weight can show it,
`bracket` does. "Bracket" is the width of `bracket`, in nats, for the proposal before annealing. In the funnel of 10
dims a fit that climbs the ELBO can leave out the neck, which the guide does not propose either: it is partly a mode
that no weight shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import log_marginal
from ppvae.errors import ContractError
from ppvae.evaluation import bracket

Sites = Callable[[], None]  # samples the latents of one side, inside the data plate


def normal(name: str, loc: float, scale: float, dims: int) -> Tensor:
    """A latent of independent normals."""
    return pyro.sample(name, dist.Normal(torch.full((dims,), loc), scale).to_event(1))


def ridge(dims: int, marginal: bool) -> tuple[Sites, Sites]:
    """Precision I + 6/dims 11'; the guide's scales are the conditional or the marginal ones."""
    precision = torch.eye(dims) + 12.0 / dims * torch.ones(dims, dims)
    variance = precision.inverse().diagonal()[0] if marginal else 1 / precision[0, 0]

    def prior() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(dims), precision_matrix=precision))

    return prior, lambda: normal("z", 0.0, float(variance.sqrt()), dims)


def heavy(dims: int, df: float) -> tuple[Sites, Sites]:
    """Student's t under a normal of the same variance."""

    def prior() -> None:
        pyro.sample("z", dist.StudentT(df, torch.zeros(dims), 1.0).to_event(1))

    return prior, lambda: normal("z", 0.0, math.sqrt(df / (df - 2)), dims)


def funnel(dims: int) -> tuple[Sites, Sites]:
    """dims - 1 coordinates with the scale exp(a / 2), a ~ N(0, 1.5), under a mean-field normal."""

    def prior() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.5))
        pyro.sample("z", dist.Normal(torch.zeros(dims - 1), (0.5 * a).exp()[..., None]).to_event(1))

    def guide() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.2))
        normal("z", 0.0, 1.2, dims - 1)

    return prior, guide


def skewed(dims: int) -> tuple[Sites, Sites]:
    """Gumbel under a normal of the same moments."""

    def prior() -> None:
        pyro.sample("z", dist.Gumbel(torch.zeros(dims), 1.0).to_event(1))

    return prior, lambda: normal("z", 0.5772, math.pi / math.sqrt(6), dims)


def two_modes(dims: int, loc: float, scale: float) -> tuple[Sites, Sites]:
    """Modes at -3 and 3 along the first coordinate; the guide is N(loc, scale^2) there."""
    locs = torch.zeros(2, dims)
    locs[:, 0] = torch.tensor([-3.0, 3.0])
    first = torch.ones(dims)
    first[0] = scale

    def prior() -> None:
        components = dist.Normal(locs, 1.0).to_event(1)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))

    def guide() -> None:
        at = torch.zeros(dims)
        at[0] = loc
        pyro.sample("z", dist.Normal(at, first).to_event(1))

    return prior, guide


def discrete(dims: int) -> tuple[Sites, Sites]:
    """A class of ten, and a latent whose location it sets; the guide has the classes' order reversed."""
    logits = torch.arange(10.0) * 0.25

    def prior() -> None:
        c = pyro.sample("c", dist.Categorical(logits=logits))
        pyro.sample("z", dist.Normal(c[..., None].to(logits) * torch.ones(dims), 1.0).to_event(1))

    def guide() -> None:
        c = pyro.sample("c", dist.Categorical(logits=-logits))
        pyro.sample("z", dist.Normal(c[..., None].to(logits) * torch.ones(dims), 1.2).to_event(1))

    return prior, guide


def good(dims: int) -> tuple[Sites, Sites]:
    """A normal, 3 % too wide."""
    return lambda: normal("z", 0.0, 1.0, dims), lambda: normal("z", 0.0, 1.03, dims)


POSTERIORS: dict[str, Callable[[], tuple[Sites, Sites]]] = {
    "good, 1 dim": lambda: good(1),
    "good, 10 dims": lambda: good(10),
    "good, 100 dims": lambda: good(100),
    "ridge, 2 dims, conditional": lambda: ridge(2, False),
    "ridge, 2 dims, marginal": lambda: ridge(2, True),
    "ridge, 20 dims, conditional": lambda: ridge(20, False),
    "t(3), 1 dim": lambda: heavy(1, 3.0),
    "t(5), 10 dims": lambda: heavy(10, 5.0),
    "funnel, 2 dims": lambda: funnel(2),
    "funnel, 10 dims": lambda: funnel(10),
    "skewed, 1 dim": lambda: skewed(1),
    "skewed, 10 dims": lambda: skewed(10),
    "two modes, broad guide": lambda: two_modes(2, 0.0, 3.0),
    "two modes, guide leans to one": lambda: two_modes(2, 2.0, 2.0),
    "discrete x continuous": lambda: discrete(2),
    "two modes, one unknown": lambda: two_modes(2, 3.0, 1.0),
}


@dataclass(frozen=True)
class Settings:
    """The posteriors, the methods and the numbers of particles; some CPU minutes in all."""

    posteriors: tuple[str, ...] = tuple(POSTERIORS)
    methods: tuple[str, ...] = ("guide", "refined", "auto")
    particles: tuple[int, ...] = (1000, 5000)
    seeds: tuple[int, ...] = (0,)
    num_data: int = 400
    num_fitted: int = 100


SMOKE = {"posteriors": ("good, 1 dim", "t(3), 1 dim"), "methods": ("guide", "auto"), "particles": (200,)}
SMOKE |= {"num_data": 20, "num_fitted": 10}


def pair_of(name: str) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """(model, guide) of a posterior."""
    prior, posterior = POSTERIORS[name]()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior()
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            posterior()

    return model, guide


def measure(
    name: str, method: str, particles: int, num_data: int, seed: int = 0, simulated: int = 50
) -> dict[str, float]:
    """How many data are reliable, how many of these are off, the mean z, the mean error, and the bracket's width."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_data, generator=generator, dtype=torch.get_default_dtype())
    model, guide = pair_of(name)
    how: dict[str, Any] = {"method": "auto"} if method == "auto" else {"proposal": method}
    est = log_marginal(model, guide, x, num_particles=particles, seed=seed, progress=False, **how)
    error = est.log_px - dist.Normal(0.0, 1.0).log_prob(x)
    z = torch.where(error.abs() < 1e-5, torch.zeros_like(error), error / est.std_error)
    good = est.reliable
    out = {
        "reliable": float(good.double().mean()), "error": float(error.mean()), "count": int(good.sum()),
        "nll": est.nll, "nll_std_error": est.nll_std_error,
        "annealed": float(est.diagnostics.get("method", torch.zeros(1)).double().mean()),
    }  # fmt: skip
    if bool(good.any()):
        off = z[good].abs() > 5
        out |= {"off": float(off.double().mean()), "z": float(z[good].mean())}
        out |= {"z_sd": float(z[good].std()) if int(good.sum()) > 1 else 0.0}
    if simulated:
        kind = "guide" if method == "guide" else "refined"
        found = bracket(
            model, guide, x[:1], num_data=simulated, num_particles=particles, proposal=kind, further=False,
            seed=seed, progress=False,
        )  # fmt: skip
        out |= {"width": found.width} if math.isfinite(found.width) else {}
    return out | {"digest": est.digest}  # type: ignore[dict-item]


def compute(s: Settings, workspace: Workspace, posterior: str, method: str, particle: int, seed: int) -> dict[str, Any]:
    """One posterior, method and K."""
    del workspace
    torch.set_default_dtype(torch.float64)
    try:
        return measure(posterior, method, particle, s.num_data if method == "guide" else s.num_fitted, seed)
    except ContractError as error:
        return {"skipped": str(error), "digest": "0" * 64, "count": 0.0, "nll": 0.0, "nll_std_error": 0.0}
    finally:
        torch.set_default_dtype(torch.float32)


def table(found: Cells) -> str:
    """One row per posterior and method, with a group of columns per K."""
    rows = []
    for (posterior, method), group in cells.group_cells(found, "posterior", "method").items():
        kept = [c for c in group if "skipped" not in c["result"]]
        for c in kept:
            r = c["result"]
            off = f"{100 * r['off']:.1f}" if "off" in r else ""
            z = f"{r['z']:+.2f}" if "z" in r else ""
            width = f"{r['width']:.3f}" if "width" in r and method != "auto" else ""
            rows.append([
                posterior, method, f"{c['cell']['particle']:,}", f"{100 * r['reliable']:.0f}", off, z,
                f"{r['error']:+.3f}", f"{100 * r['annealed']:.0f}", width,
            ])  # fmt: skip
    header = ("posterior", "method", "K", "reliable %", "of these off %", "z", "error", "annealed %", "bracket")
    return cells.markdown(header, rows) + "\n\n" + totals(found)


def totals(found: Cells) -> str:
    """The share of reliable data that are off, per method, where weights alone can know."""
    words = []
    for (method,), group in cells.group_cells(found, "method").items():
        known = [c["result"] for c in group if c["cell"]["posterior"] != "two modes, one unknown"]
        known = [r for r in known if r.get("count")]
        if total := sum(r["count"] for r in known):
            off = sum(r["count"] * r["off"] for r in known)
            worst = max(r["off"] for r in known if r["count"] >= 20) if any(r["count"] >= 20 for r in known) else 0.0
            z = sum(r["count"] * r["z"] for r in known) / total
            words.append(
                f"{method}: of {total:,.0f} reliable data {100 * off / total:.2f} % are off by more than 5 standard "
                f"errors ({100 * worst:.1f} % in the worst cell of 20 or more), mean z {z:+.2f}"
            )
    return "; ".join(words) + ". Without the mode that nothing proposes."


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    axes = ("posterior", "method", "particle", "seed")
    cells.run("calibration_battery", Settings, axes, compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
