"""Signal-to-noise ratio and variance of gradient estimators of the importance-weighted bound, by K.

Pathwise estimators: the Gaussian model of Rainforth et al. 2018 (arXiv 1802.04537), z ~ N(mu, I), x | z ~ N(z, I) and
q(z | x) = N(A x + b, 2/3 I), near its optimum; the signal-to-noise ratio of the guide's pathwise gradient falls with K,
that of the doubly reparameterised gradient rises (Tucker et al. 2019, arXiv 1810.04152). Score-function estimators:
binary latents, z ~ Bernoulli(1/2) and x | z ~ N(W z, I). The ratio is |mean| / sd of a coordinate of the gradient,
averaged over coordinates; the mean of n draws has noise of its own, so that ratios below 0.8 / sqrt(n) are not
resolved."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from experiments.cells import Cells, Workspace, group_cells, markdown, run, values
from ppvae import data, objectives
from ppvae.objectives import gradients
from ppvae.objectives.gradients.control_variates import NoBaseline
from ppvae.plots.style import BLUE, FAINT, GREEN, INK, VERMILLION, figure, styled


@dataclass(frozen=True)
class Settings:
    """The point at which gradients are estimated, and the number of draws."""

    estimators: tuple[str, ...] = ("pathwise", "stl", "dreg", "score", "score, moving average", "vimco")
    ks: tuple[int, ...] = (2, 4, 16, 64, 256, 1024)
    dims: int = 20
    num_data: int = 16
    away: float = 0.01
    draws: int = 2000
    seed: int = 0


SMOKE = {"ks": (2, 8), "dims": 3, "num_data": 4, "draws": 20}
PATHS = {"pathwise": gradients.Pathwise, "stl": gradients.STL, "dreg": gradients.DReG}
SCORES = {"score": lambda: gradients.ScoreFunction(NoBaseline()), "score, moving average": gradients.ScoreFunction}
ESTIMATORS: dict[str, Callable[[], Any]] = PATHS | SCORES | {"vimco": gradients.vimco}


class GaussianPair(nn.Module):
    """Rainforth's pair at its optimum, A = I / 2 and b = mu / 2, perturbed by small noise."""

    def __init__(self, x: Tensor, away: float):
        super().__init__()
        best = {"mu": x.mean(0), "weight": torch.eye(x.shape[1]) / 2, "bias": x.mean(0) / 2}
        for name, value in best.items():
            setattr(self, name, nn.Parameter(value + away * torch.randn(value.shape)))

    def model(self, x: Tensor) -> None:
        pyro.module("gaussian", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("gaussian", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.weight.T + self.bias, (2 / 3) ** 0.5).to_event(1))


class BernoulliPair(nn.Module):
    """The same with one binary latent per dim; the guide is a logistic regression."""

    def __init__(self, x: Tensor, away: float):
        super().__init__()
        dims = x.shape[1]
        self.mu, self.weight = (nn.Parameter(torch.eye(dims) + away * torch.randn(dims, dims)) for _ in range(2))
        self.bias = nn.Parameter(-0.5 + away * torch.randn(dims))

    def model(self, x: Tensor) -> None:
        pyro.module("bits", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones_like(self.bias)).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.mu.T, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("bits", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x @ self.weight.T + self.bias).to_event(1))


def compute(s: Settings, workspace: Workspace, estimator: str, k: int) -> dict[str, Any]:
    """Signal-to-noise ratio and variance of the gradient, for the guide's and the model's parameters."""
    pyro.clear_param_store()
    torch.manual_seed(s.seed)
    x = torch.randn(s.num_data, s.dims) * 2**0.5 + torch.randn(s.dims)
    pair = (GaussianPair if estimator in PATHS else BernoulliPair)(x, s.away)
    objective = objectives.IWAE(k, gradient=ESTIMATORS[estimator]())
    wanted = {"guide": [pair.weight, pair.bias], "model": [pair.mu]}
    total = {name: torch.zeros(2, sum(p.numel() for p in own), dtype=torch.float64) for name, own in wanted.items()}
    for _ in range(s.draws):
        pair.zero_grad()
        objective.loss_and_grads(pair.model, pair.guide, x)
        for name, own in wanted.items():
            g = torch.cat([p.grad.flatten() for p in own if p.grad is not None]).double() / s.num_data
            total[name] += torch.stack([g, g.square()])
    out: dict[str, Any] = {"digest": data.digest(x)}
    for name, (first, second) in total.items():
        mean, variance = first / s.draws, (second - first.square() / s.draws) / (s.draws - 1)
        out[f"snr_{name}"] = float((mean.abs() / variance.sqrt()).mean())
        out[f"variance_{name}"] = float(variance.mean())
    return out


def table(found: Cells) -> str:
    """The guide's and the model's variances, and the guide's signal-to-noise ratios, by K."""
    ks, out = [k for (k,) in group_cells(found, "k")], []
    titles = {"variance": "Variance", "snr": "Signal-to-noise ratio"}
    for key, side in itertools.product(titles, ("guide", "model")):
        lines = group_cells(found, "estimator").items()
        rows = [[e, *(f"{c['result'][f'{key}_{side}']:.2e}" for c in r)] for (e,), r in lines]
        out.append(f"**{titles[key]}, {side}**\n\n{markdown(('estimator', *(f'K = {k}' for k in ks)), rows)}\n")
    return "\n".join(out)


@styled
def draw_figure(found: Cells) -> Any:
    """The signal-to-noise ratio of pathwise estimators by K; the model's gradient is the same for all."""
    fig, floor = figure(6.8, 2.8), 0.8 / found[0]["settings"]["draws"] ** 0.5
    colours = dict(zip(PATHS, (BLUE, GREEN, VERMILLION), strict=True))
    for ax, side in zip(fig.subplots(1, 2, sharey=True), ("guide", "model"), strict=True):
        for (name,), r in group_cells(found, "estimator").items():
            if name in PATHS and (side == "guide" or name == "pathwise"):
                label, colour = (name, colours[name]) if side == "guide" else ("all", INK)
                ks, ratios = [c["cell"]["k"] for c in r], values(r, f"snr_{side}")
                ax.loglog(ks, ratios, "o-", color=colour)
                ax.annotate(label, (ks[-1], ratios[-1]), (6, 2), textcoords="offset points", color=colour)
        ax.axhline(floor, color=FAINT, lw=0.8, ls=":")
        ax.set(title=f"gradient of the {side}", xlabel="particles K", xlim=(1.5, 8 * ax.get_xlim()[1]))
    ax.annotate("noise", (2, floor), (0, 2), textcoords="offset points", color=FAINT)
    fig.axes[0].set_ylabel("signal-to-noise ratio")
    return fig


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    cells, folder = run("gradients", Settings, ("estimator", "k"), compute, table, SMOKE, __doc__, args)
    draw_figure(cells).savefig(folder / "gradients.png")


if __name__ == "__main__":
    main()
