"""Discrete codes with a learned prior: M codes with V values each, near the output of the encoder (SQ-VAE, Takida et
al. 2022, arXiv 2205.07547; VQ-VAE, van den Oord et al. 2017, arXiv 1711.00937), on binarised images.

The prior over the codes, independent or autoregressive, is learned jointly by VIMCO with 10 draws, so that log p(x)
includes it. On scikit-learn's digits, log p(x) is also computed exactly, as a sum over all 4096 code vectors, to
validate importance sampling. Perplexity is the exponential of the entropy of a position's codes over the test images,
averaged over positions: the effective number of codes in use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import config_enumerate

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import data, generate, likelihoods, log_marginal, nn, objectives, priors
from ppvae.models import QuantizedVAE
from ppvae.plots import image_grid


@dataclass(frozen=True)
class Settings:
    """The rows, data-M-V, the priors, and the common schedule."""

    rows: tuple[str, ...] = ("digits-4-8", "mnist-16-16")
    priors: tuple[str, ...] = ("independent", "autoregressive")
    seeds: tuple[int, ...] = (0, 1, 2)
    size: int = 8
    hidden: int = 200
    draws: int = 10
    steps: int = 2000
    batch_size: int = 100
    lr: float = 2e-3
    num_test: int = 1000
    particles: int = 1000


MAX_CODES = 5000  # code vectors that are summed over exactly
SMOKE = {"rows": ("digits-2-4",), "seeds": (0,), "hidden": 8, "steps": 14, "num_test": 20, "particles": 50}
PRIORS = {
    "independent": lambda values, codes: priors.OneHot(values, codes, learned=True),
    "autoregressive": lambda values, codes: priors.AutoregressiveOneHot(values, codes, hidden=(200,)),
}


def perplexity(vae: QuantizedVAE, x: torch.Tensor, values: int) -> float:
    """The effective number of values of a code on these images, averaged over codes."""
    with torch.no_grad():
        used = vae.posterior.net(x).unflatten(-1, (-1, values)).softmax(-1).mean(0)
    return float(torch.distributions.Categorical(used).entropy().exp().mean())


def compute(s: Settings, workspace: Workspace, row: str, prior: str, seed: int) -> dict[str, Any]:
    """Trains one pair; log p(x) by importance sampling, and exactly if there are few code vectors."""
    name, codes, values = row.split("-")[0], *map(int, row.split("-")[1:])
    images, valid, test = data.load(name, workspace.root, binarize="dynamic")
    torch.manual_seed(seed)
    dims, inner = images.shape[1], codes * s.size
    decoder = nn.mlp(inner, dims, hidden=(s.hidden,))
    nn.set_output_bias(decoder, images.as_subclass(torch.Tensor).mean(0).clamp(1e-3, 1 - 1e-3).logit())
    vae = QuantizedVAE(
        PRIORS[prior](values, codes), likelihoods.Bernoulli(decoder), nn.mlp(dims, inner, hidden=(s.hidden,)),
        nn.Codebook(values, s.size),
    )  # fmt: skip
    trained = cells.train(
        vae, images, valid, workspace, epochs=math.ceil(s.steps / math.ceil(len(images) / s.batch_size)), lr=s.lr,
        batch_size=s.batch_size, seed=seed, objective=objectives.IWAE(s.draws, gradient="vimco"),
    )  # fmt: skip
    drawn = generate.samples(trained.model, trained.guide, test[:1].to(workspace.device or "cpu"), 16, seed=seed)
    np.save(workspace.folder / "samples.npy", drawn.reshape(16, *test.event_shape).cpu().numpy())
    test = test.head(s.num_test)
    est = log_marginal(trained.model, trained.guide, test, num_particles=s.particles, seed=seed, proposal="guide")
    result = cells.estimate_summary(est) | cells.training_summary(trained)
    result["perplexity"] = perplexity(vae, test.read().to(workspace.device or "cpu"), values)
    result["scale"] = float(vae.posterior.net[1].log_scale.detach().exp())
    if values**codes <= MAX_CODES:
        exact = log_marginal(
            trained.model, config_enumerate(trained.guide), test, num_particles=1, seed=seed, proposal="guide"
        )
        off = est.log_px - exact.log_px
        result |= {"exact": exact.nll, "off": float(off.mean())}
        result |= {f"off_{word}": float(off[is_so].abs().mean()) if bool(is_so.any()) else 0.0
                   for word, is_so in (("reliable", est.reliable), ("unreliable", ~est.reliable))}  # fmt: skip
    return result


def table(found: Cells) -> str:
    """A table per data set, with the gain on independent codes."""
    out = []
    rows = cells.group_cells(found, "row", "prior")
    for name in dict.fromkeys(row for row, _ in rows):
        of, codes, values = name.split("-")
        own = {prior: r for (row, prior), r in rows.items() if row == name}
        sums = all("exact" in c["result"] for r in own.values() for c in r)
        header = ["prior", "seeds", "test NLL", "ELBO", "unreliable", "perplexity", "gain on independent codes"]
        header += ["exact NLL", "error, reliable", "error, unreliable"] * sums
        lines = []
        for prior, r in own.items():
            share = f"{100 * cells.mean(r, 'unreliable') / cells.mean(r, 'num_data'):.0f} %"
            gain = cells.compare_rows(r, own["independent"]) if prior != "independent" and "independent" in own else ""
            line = [prior, len(r), f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}"]
            line += [f"{cells.mean(r, 'elbo'):.2f}", share, f"{cells.mean(r, 'perplexity'):.1f} of {values}", gain]
            if sums:
                line += [f"{cells.mean(r, 'exact'):.2f}"]
                line += [f"{cells.mean(r, f'off_{word}'):.3f}" for word in ("reliable", "unreliable")]
            lines.append(line)
        out.append(f"**{of}, {codes} codes of {values} values**\n\n{cells.markdown(header, lines)}")
    return "\n\n".join(out)


def draw_figure(folder: Path, usual: Settings) -> None:
    """Sixteen samples per prior, for the last data set; cells without their run folder are left out."""
    drawn: dict[str, dict[str, Any]] = {}
    for (row, prior), r in cells.group_cells(cells.load_cells(folder, usual), "row", "prior").items():
        path = Path(r[0]["folder"]) / "samples.npy"
        if path.exists():
            drawn.setdefault(row, {})[prior] = np.load(path)
    if drawn:
        last = [*drawn.values()][-1]
        images = np.stack(list(last.values()))
        image_grid(images, images.shape[2:], row_titles=list(last)).savefig(folder / "samples.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    _, folder = cells.run("codes", Settings, ("row", "prior", "seed"), compute, table, SMOKE, __doc__, args)
    draw_figure(folder, Settings())


if __name__ == "__main__":
    main()
