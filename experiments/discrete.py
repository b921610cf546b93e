"""Discrete VAEs: 200 binary latents on dynamically binarised MNIST, and 8 on scikit-learn's digits, which can be summed
out.

p(x | z) and q(z | x) are independent Bernoullis from networks with one hidden layer; p(z) is an independent Bernoulli
with learned probabilities. Every row of a data set has the same number of Adam steps: VIMCO maximises the
importance-weighted bound of K draws (Mnih and Rezende 2016, arXiv 1602.06725), reweighted wake-sleep takes K draws for
both phases (Bornschein and Bengio 2015, arXiv 1406.2751), and the score-function estimator maximises the ELBO with K
draws and a moving-average baseline (Mnih and Gregor 2014, arXiv 1402.0030). The other rows maximise the ELBO at the
same number of evaluations of the decoder: VarGrad and Double CV with K draws (arXiv 2010.10436, 2111.05300), DisARM
with K / 2 pairs (arXiv 2006.10680), ARMS with K antithetic draws (arXiv 2105.14141), REBAR and RELAX with K / 3 draws
(arXiv 1703.07370, 1711.00123), two sets of K / 2 draws without replacement (arXiv 2002.06043), straight-through with K
draws. With 8 latents, log p(x) and the ELBO are exact sums over 256 values; the row trained on the exact ELBO is the
oracle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from pyro.infer import config_enumerate

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.objectives import gradients

COMPARED = ("VIMCO", "VarGrad", "DisARM", "ARMS", "Double CV")  # at equal numbers of evaluations of the decoder


@dataclass(frozen=True)
class Settings:
    """The rows, data-bits-estimator, and the common schedule."""

    rows: tuple[str, ...] = (
        *("mnist-200-VIMCO", "mnist-200-wake-sleep", "mnist-200-score"),
        *("digits-8-VIMCO", "digits-8-wake-sleep", "digits-8-score", "digits-8-enumerated"),
        *(f"mnist-200-{name}" for name in ("VarGrad", "DisARM", "ARMS", "Double CV", "REBAR", "RELAX")),
        *(f"digits-8-{name}" for name in ("VarGrad", "DisARM", "ARMS", "Double CV", "REBAR", "RELAX", "set")),
        *(f"{of}-straight-through" for of in ("mnist-200", "digits-8")),
        *(f"{of}-200-{name}" for of in ("fashion-mnist", "omniglot") for name in COMPARED),
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    draws: int = 10
    hidden: int = 200
    steps: int = 2000
    batch_size: int = 100
    lr: float = 2e-3
    num_test: int = 1000
    particles: int = 1000


MAX_BITS = 16  # binary latents that are summed out exactly
SMOKE = {"rows": ("digits-8-VIMCO", "digits-8-ARMS", "digits-8-enumerated"), "seeds": (0,), "hidden": 8}
SMOKE |= {"steps": 14, "num_test": 20, "particles": 50}
ESTIMATORS: dict[str, Callable[[int], Any]] = {
    "VIMCO": lambda k: objectives.IWAE(k, gradient="vimco"),
    "wake-sleep": objectives.ReweightedWakeSleep,
    "score": lambda k: objectives.ELBO(k, gradient="score"),
    "enumerated": lambda k: objectives.ELBO(),
    "VarGrad": lambda k: objectives.ELBO(k, gradient="vargrad"),
    "DisARM": lambda k: objectives.ELBO(max(1, k // 2), gradient="disarm"),
    "ARMS": lambda k: objectives.ELBO(1, gradient=gradients.ARMS(k)),
    "Double CV": lambda k: objectives.ELBO(k, gradient="double_cv"),
    "REBAR": lambda k: objectives.ELBO(max(1, k // 3), gradient="rebar"),
    "RELAX": lambda k: objectives.ELBO(max(1, k // 3), gradient="relax"),
    "set": lambda k: objectives.ELBO(2, gradient=gradients.UnorderedSet(max(2, k // 2))),
    "straight-through": lambda k: objectives.ELBO(k, gradient="straight_through"),
}


def parts_of(row: str) -> tuple[str, str, str]:
    """(data set, number of bits, estimator) of a row.

    >>> parts_of("fashion-mnist-200-straight-through")
    ('fashion-mnist', '200', 'straight-through')
    """
    found = re.fullmatch(r"(.+?)-(\d+)-(.+)", row)
    if found is None:
        raise ValueError(f"row: expected data-bits-estimator, found {row!r}")
    return found[1], found[2], found[3]


def compute(s: Settings, workspace: Workspace, row: str, seed: int) -> dict[str, Any]:
    """Trains one pair; evaluates it on validation and test images by L_K, and exactly if there are few latents."""
    name, bits, estimator = parts_of(row)
    images, valid, test = data.load(name, workspace.root, binarize="dynamic")
    torch.manual_seed(seed)
    latent, dims = int(bits), images.shape[1]
    decoder = nn.mlp(latent, dims, hidden=(s.hidden,))
    nn.set_output_bias(decoder, images.as_subclass(torch.Tensor).mean(0).clamp(1e-3, 1 - 1e-3).logit())
    encoder = nn.mlp(dims, latent, hidden=(s.hidden,))
    vae = VAE(priors.Bernoulli(latent, learned=True), likelihoods.Bernoulli(decoder), posteriors.Bernoulli(encoder))
    summed = config_enumerate(vae.guide)
    pair = SimpleNamespace(model=vae.model, guide=summed if estimator == "enumerated" else vae.guide)
    trained = cells.train(
        pair, images, valid, workspace, epochs=math.ceil(s.steps / math.ceil(len(images) / s.batch_size)), lr=s.lr,
        batch_size=s.batch_size, seed=seed, objective=ESTIMATORS[estimator](s.draws),
    )  # fmt: skip
    valid, test = valid.head(s.num_test), test.head(s.num_test)
    est, of_valid = (
        log_marginal(vae.model, vae.guide, x, num_particles=s.particles, proposal="guide") for x in (test, valid)
    )
    result = cells.estimate_summary(est) | cells.training_summary(trained) | {"valid_nll": of_valid.nll}
    if latent <= MAX_BITS:
        exact = log_marginal(vae.model, summed, test, num_particles=1, proposal="guide")
        result |= {"exact": exact.nll, "exact_elbo": float(exact.elbo.mean())}
    return result


def table(found: Cells) -> str:
    """A table per pair; its rows compared with the score-function estimator or the exact ELBO."""
    out = []
    rows = {parts_of(row): r for (row,), r in cells.group_cells(found, "row").items()}
    for pair in dict.fromkeys(key[:2] for key in rows):
        own = {estimator: r for (*of, estimator), r in rows.items() if tuple(of) == pair}
        oracle = next((e for e in ("enumerated", "score") if e in own), "")
        sums = int(pair[1]) <= MAX_BITS
        header = ["gradient", "seeds", "test L_K", "validation L_K", "ELBO, drawn", "CPU ms/step"]
        header += ["exact log p", "exact ELBO"] * sums + [f"gain on {oracle}"] * bool(oracle)
        lines = []
        for name, r in own.items():
            line = [name, len(r), f"{-cells.mean(r):.2f} ± {cells.standard_error(r):.2f}"]
            line += [f"{-cells.mean(r, 'valid_nll'):.2f}", f"{cells.mean(r, 'elbo'):.2f}"]
            line += [f"{cells.mean(r, 'cpu_ms_per_step'):.1f}"]
            line += [f"{-cells.mean(r, 'exact'):.2f}", f"{cells.mean(r, 'exact_elbo'):.2f}"] if sums else []
            gain = cells.compare_rows(r, own[oracle]) if oracle and name != oracle else ""
            lines.append(line + [gain] * bool(oracle))
        first = found[0]["settings"]
        title = f"**{pair[0]}, {pair[1]} bits**: K = {first['particles']}, {first['draws']} draws a step"
        text = f"{title}\n\n{cells.markdown(header, lines)}"
        pairs = [(a, b) for a in ("ARMS", "Double CV") for b in ("VIMCO", "VarGrad") if a in own and b in own]
        if pairs:
            gains = "; ".join(f"{a} over {b} {cells.compare_rows(own[a], own[b])}" for a, b in pairs)
            text += f"\n\nAt {first['steps']} steps and as many evaluations of the decoder, test log p(x): {gains}."
        out.append(text)
    return "\n\n".join(out)


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    cells.run("discrete", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
