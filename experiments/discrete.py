"""Discrete VAEs: 200 binary latents on dynamically binarised images, and 8 on scikit-learn's digits, which can be
summed out.

p(x | z) and q(z | x) are independent Bernoullis; p(z) is an independent Bernoulli with learned probabilities. The
networks are linear, or have two hidden layers of 200 LeakyReLU(0.3); batches of 50, Adam of 1e-4, the prior by SGD of
1e-2: the setting of Dimitriev and Zhou 2021 (arXiv 2105.14141), who take 10^6 steps. Every row of a data set has the
same number of steps, each of K evaluations of the decoder per datum: leave-one-out, VarGrad and Double CV maximise the
ELBO of K draws (Kool et al. 2019; arXiv 2010.10436, 2111.05300), DisARM of K / 2 pairs (arXiv 2006.10680), ARMS of K
antithetic draws, REBAR and RELAX of K / 3 draws, which they evaluate three times (arXiv 1703.07370, 1711.00123),
straight-through of K draws, "set" of two times K / 2 draws without replacement (arXiv 2002.06043), and "score" of K
draws with a moving-average baseline (arXiv 1402.0030). VIMCO maximises the importance-weighted bound of K draws (arXiv
1602.06725), and reweighted wake-sleep takes K draws for both phases (arXiv 1406.2751). Gradients in the latents (Double
CV, REBAR, RELAX, straight-through) are not counted; the CPU time of a step is in the table. L_K is of all test images.

The variance is that of one step's gradient of the guide, on 50 validation images, summed over parameters; VIMCO's is of
another bound. With 8 latents, log p(x) and the ELBO are exact sums over 256 values, and the row trained on the exact
ELBO is the oracle: `--rows digits-8-ARMS ... --networks nonlinear --steps 2000 --batch-size 100 --lr 2e-3`."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from pyro.infer import config_enumerate
from pyro.optim import PyroOptim

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, evaluation, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.objectives import gradients
from ppvae.plots.style import figure, styled

ESTIMATORS: dict[str, Callable[[int], Any]] = {
    "leave-one-out": lambda k: objectives.ELBO(k, gradient="vimco"),
    "VarGrad": lambda k: objectives.ELBO(k, gradient="vargrad"),
    "DisARM": lambda k: objectives.ELBO(max(1, k // 2), gradient="disarm"),
    "ARMS": lambda k: objectives.ELBO(1, gradient=gradients.ARMS(k)),
    "Double CV": lambda k: objectives.ELBO(k, gradient="double_cv"),
    "REBAR": lambda k: objectives.ELBO(max(1, k // 3), gradient="rebar"),
    "RELAX": lambda k: objectives.ELBO(max(1, k // 3), gradient="relax"),
    "straight-through": lambda k: objectives.ELBO(k, gradient="straight_through"),
    "score": lambda k: objectives.ELBO(k, gradient="score"),
    "VIMCO": lambda k: objectives.IWAE(k, gradient="vimco"),
    "wake-sleep": objectives.ReweightedWakeSleep,
    "set": lambda k: objectives.ELBO(2, gradient=gradients.UnorderedSet(max(2, k // 2))),
    "enumerated": lambda k: objectives.ELBO(),
}
COMPARED = ("leave-one-out", "DisARM", "ARMS", "Double CV", "VIMCO")  # on the further data sets


@dataclass(frozen=True)
class Settings:
    """The rows, data-bits-estimator, the networks, and the common schedule."""

    rows: tuple[str, ...] = (
        *(f"mnist-200-{name}" for name in ESTIMATORS if name not in ("set", "enumerated")),
        *(f"{of}-200-{name}" for of in ("fashion-mnist", "omniglot-random") for name in COMPARED),
    )
    networks: tuple[str, ...] = ("nonlinear", "linear")
    seeds: tuple[int, ...] = (0, 1, 2)
    draws: int = 6
    hidden: int = 200
    steps: int = 50_000
    batch_size: int = 50
    lr: float = 1e-4
    prior_lr: float = 1e-2
    num_test: int = 10_000
    particles: int = 100
    variance_draws: int = 100


MAX_BITS = 16  # binary latents that are summed out exactly
VARIANCES = 10  # times along training at which the variance of gradients is measured, after the first epoch
SMOKE = {"rows": ("digits-8-VIMCO", "digits-8-ARMS", "digits-8-enumerated"), "networks": ("nonlinear",), "seeds": (0,)}
SMOKE |= {"hidden": 8, "steps": 58, "num_test": 20, "particles": 50, "variance_draws": 10}


def parts_of(row: str) -> tuple[str, str, str]:
    """(data set, number of bits, estimator) of a row.

    >>> parts_of("fashion-mnist-200-straight-through")
    ('fashion-mnist', '200', 'straight-through')
    """
    found = re.fullmatch(r"(.+?)-(\d+)-(.+)", row)
    if found is None:
        raise ValueError(f"row: expected data-bits-estimator, found {row!r}")
    return found[1], found[2], found[3]


def adam_or_sgd(params: Any, rule: str, lr: float) -> torch.optim.Optimizer:
    """A torch optimizer of the rule."""
    return torch.optim.SGD(params, lr=lr) if rule == "sgd" else torch.optim.Adam(params, lr=lr)


def rules(lr: float, prior_lr: float) -> Callable[[str], dict[str, Any]]:
    """Plain gradient steps for the prior, Adam for the networks, by the name of a parameter."""

    def of(name: str) -> dict[str, Any]:
        return {"rule": "sgd", "lr": prior_lr} if "prior" in name else {"rule": "adam", "lr": lr}

    return of


def compute(s: Settings, workspace: Workspace, row: str, network: str, seed: int) -> dict[str, Any]:
    """Trains one pair; evaluates it on training and test images, and exactly if there are few latents."""
    name, bits, estimator = parts_of(row)
    images, valid, test = data.load(name, workspace.root, binarize="dynamic")
    torch.manual_seed(seed)
    latent, dims = int(bits), images.shape[1]
    hidden = {"linear": (), "nonlinear": (s.hidden, s.hidden)}[network]
    net = functools.partial(nn.mlp, hidden=hidden, activation=functools.partial(torch.nn.LeakyReLU, 0.3))
    decoder, encoder = net(latent, dims), net(dims, latent)
    nn.set_output_bias(decoder, images.as_subclass(torch.Tensor).mean(0).clamp(1e-3, 1 - 1e-3).logit())
    vae = VAE(priors.Bernoulli(latent, learned=True), likelihoods.Bernoulli(decoder), posteriors.Bernoulli(encoder))
    summed = config_enumerate(vae.guide)
    pair = SimpleNamespace(model=vae.model, guide=summed if estimator == "enumerated" else vae.guide)
    objective, epochs = ESTIMATORS[estimator](s.draws), math.ceil(s.steps / math.ceil(len(images) / s.batch_size))
    every = max(1, epochs // VARIANCES)

    def measure(run: Any, metrics: dict[str, Any]) -> None:
        """The variance of the gradient of one step, as the estimator is at this epoch."""
        if estimator not in ("wake-sleep", "enumerated") and metrics["epoch"] % every == 1 % every:
            batch, options = valid.head(s.batch_size), {"draws": s.variance_draws, "warmup": 1}
            found = evaluation.gradients(run.model, run.guide, batch, objective, [objective.gradient], **options)
            metrics |= {f"variance_{side}": float(found.variance[side][0]) for side in ("z", "model")}

    trained = cells.train(
        pair, images, valid, workspace, epochs=epochs, lr=s.lr, scheduler=None, batch_size=s.batch_size, seed=seed,
        optimizer=PyroOptim(adam_or_sgd, rules(s.lr, s.prior_lr)),
        objective=objective, precision="auto", untimed=(measure,),
    )  # fmt: skip
    given: dict[str, Any] = {"proposal": "guide", "num_particles": s.particles}
    est = log_marginal(vae.model, vae.guide, test.head(s.num_test), **given)
    of_train = log_marginal(vae.model, vae.guide, images.head(s.num_test), **given | {"num_particles": 10})
    result = cells.estimate_summary(est) | cells.training_summary(trained)
    result |= {"train_elbo": float(of_train.elbo.mean())}
    measured = [epoch for epoch in trained.history if "variance_z" in epoch]
    result |= {key: [epoch[key] for epoch in measured] for key in ("step", "variance_z", "variance_model")}
    if latent <= MAX_BITS:
        exact = log_marginal(vae.model, summed, test.head(s.num_test), num_particles=1, proposal="guide")
        result |= {"exact": exact.nll, "exact_elbo": float(exact.elbo.mean())}
    return result


def table(found: Cells) -> str:
    """A table per data set and network; its rows compared with leave-one-out or the exact ELBO."""
    out = []
    rows = {(*parts_of(row), net): r for (row, net), r in cells.group_cells(found, "row", "network").items()}
    for pair in dict.fromkeys((name, bits, net) for name, bits, _, net in rows):
        own = {estimator: r for (name, bits, estimator, net), r in rows.items() if (name, bits, net) == pair}
        oracle = next((e for e in ("enumerated", "leave-one-out") if e in own), "")
        sums = int(pair[1]) <= MAX_BITS
        header = ["gradient", "seeds", "train ELBO", "test ELBO", "test L_K", "CPU ms/step", "variance at the end"]
        header += ["exact log p", "exact ELBO"] * sums + [f"gain on {oracle}"] * bool(oracle)
        lines = []
        for name, r in own.items():
            line = [name, len(r), f"{cells.mean(r, 'train_elbo'):.2f}", f"{cells.mean(r, 'elbo'):.2f}"]
            line += [f"{-cells.mean(r):.2f} ± {cells.standard_error(r):.2f}", f"{cells.mean(r, 'cpu_ms_per_step'):.1f}"]
            line += [f"{variances(r)[-1]:.2g}" if variances(r) else ""]
            line += [f"{-cells.mean(r, 'exact'):.2f}", f"{cells.mean(r, 'exact_elbo'):.2f}"] if sums else []
            gain = cells.compare_rows(r, own[oracle]) if oracle and name != oracle else ""
            lines.append(line + [gain] * bool(oracle))
        first = found[0]["settings"]
        title = f"**{pair[0]}, {pair[1]} bits, {pair[2]}**: L_K of K = {first['particles']}, {first['draws']} "
        title += f"evaluations of the decoder a step, {first['steps']:,} steps"
        text = f"{title}\n\n{cells.markdown(header, lines)}"
        pairs = [(a, b) for a in ("ARMS", "Double CV") for b in ("leave-one-out", "VIMCO") if a in own and b in own]
        if pairs:
            gains = "; ".join(f"{a} over {b} {cells.compare_rows(own[a], own[b])}" for a, b in pairs)
            text += f"\n\nAt as many steps and evaluations of the decoder, test L_K: {gains}."
        out.append(text)
    return "\n\n".join(out)


def variances(r: Cells) -> list[float]:
    """The variance of the guide's gradient along training, averaged over seeds."""
    return [sum(v) / len(v) for v in zip(*(c["result"]["variance_z"] for c in r), strict=True)]


@styled
def draw_figure(found: Cells) -> Any:
    """The variance of the guide's gradient along training, for each data set and network."""
    groups: dict[tuple[str, str], dict[str, Cells]] = {}
    for (row, net), r in cells.group_cells(found, "row", "network").items():
        name, _, estimator = parts_of(row)
        if variances(r):
            groups.setdefault((name, net), {})[estimator] = r
    columns, rows = min(2, len(groups)), math.ceil(len(groups) / 2)
    fig = figure(3.4 * columns, 3.4 * rows)
    for ax, ((name, net), own) in zip(fig.subplots(rows, columns, squeeze=False).flat, groups.items(), strict=False):
        for estimator, r in own.items():
            number = list(ESTIMATORS).index(estimator)
            style = {"color": f"C{number}", "ls": ("-", "--")[number > 6], "label": estimator}
            ax.semilogy(r[0]["result"]["step"], variances(r), **style)
        ax.set(title=f"{name}, {net}", xlabel="step")
        ax.legend(fontsize="x-small", ncols=2)
    for ax in fig.axes[len(groups) :]:
        ax.remove()
    fig.supylabel("variance of the guide's gradient", fontsize="small")
    return fig


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure, of all stored cells of the same settings."""
    found, folder = cells.run("discrete", Settings, ("row", "network", "seed"), compute, table, SMOKE, __doc__, args)
    settings = found[0]["settings"]
    same = [c for c in cells.load_cells(folder, Settings()) if c["settings"] == settings]
    draw_figure(same).savefig(folder / f"variance-{settings['steps']}.png")


if __name__ == "__main__":
    main()
