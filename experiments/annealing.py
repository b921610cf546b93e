"""Annealed importance sampling compared with importance sampling: the looseness of L_K for K = 1 to 50,000, beside Wu
et al. 2017 (arXiv 1611.04273).

A one-layer model (784-200-200-50, tanh) is trained on MNIST on the IWAE bound, as theirs was. log p(x) of the same test
images is estimated by annealed importance sampling, with 16 chains from q(z | x), and by L_K. Both are lower bounds on
average, so that the paired difference over images is a lower bound on the looseness of L_K. Bidirectional Monte Carlo
on data simulated from the model bounds log p(x) from both sides with the same settings: its gap bounds the error of
annealing on such data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, likelihoods, log_marginal, nn, objectives, plots, posteriors, priors
from ppvae.evaluation import Bracket, annealed, bdmc, load_estimate
from ppvae.evaluation.compare import looseness_and_error
from ppvae.evaluation.results import mean_and_error

# log p(x) by annealing and L_K, of 10,000 images, each from a run of its own in their table
PUBLISHED = {10_000: (-85.679, -86.902), 100_000: (-85.619, -86.464)}


@dataclass(frozen=True)
class Settings:
    """The model, its training, and the settings of annealing; some CPU minutes in all."""

    objectives: tuple[str, ...] = ("IWAE-5",)
    seeds: tuple[int, ...] = (0,)
    data: str = "mnist"
    latent: int = 50
    hidden: tuple[int, ...] = (200, 200)
    epochs: int = 8
    batch_size: int = 100
    lr: float = 2e-3
    num_test: int = 50
    num_simulated: int = 20
    particles: int = 50_000
    chains: int = 16
    temperatures: int = 500


SMOKE = {"data": "digits", "latent": 2, "hidden": (16,), "epochs": 1, "num_test": 5, "num_simulated": 3}
SMOKE |= {"particles": 50, "temperatures": 10}


def compute(s: Settings, workspace: Workspace, objective: str, seed: int) -> dict[str, Any]:
    """Trains the model and computes the three estimates."""
    train, valid, test = data.load(s.data, workspace.root, binarize="dynamic")
    torch.manual_seed(seed)
    dims = train.shape[1]
    decoder = nn.mlp(s.latent, dims, hidden=s.hidden[::-1])
    nn.set_output_bias(decoder, train.as_subclass(torch.Tensor).mean(0).clamp(1e-3, 1 - 1e-3).logit())
    encoder = nn.mlp(dims, 2 * s.latent, hidden=s.hidden)
    vae = VAE(priors.StandardNormal(s.latent), likelihoods.Bernoulli(decoder), posteriors.DiagonalNormal(encoder))
    bound = objectives.IWAE(int(objective.partition("-")[2]), gradient="dreg")
    trained = cells.train(
        vae, train, valid, workspace, epochs=s.epochs, lr=s.lr, batch_size=s.batch_size, objective=bound, seed=seed
    )
    pair, images, folder = (trained.model, trained.guide), test.head(s.num_test), workspace.folder / "blocks"
    how = {"num_chains": s.chains, "num_temperatures": s.temperatures, "seed": seed}
    est = log_marginal(*pair, images, num_particles=s.particles, seed=seed, proposal="guide")
    tighter = annealed(*pair, images, directory=folder / "annealed", **how)
    both = bdmc(*pair, valid.head(s.num_simulated), directory=folder / "bdmc", **how)
    est.save(workspace.folder, "log_marginal")
    tighter.save(workspace.folder, "annealed")
    both.save(workspace.folder, "bracket")
    loose = {k: looseness_and_error(tighter, est, k) for k in sorted(est.bounds)}
    result = cells.training_summary(trained) | cells.estimate_summary(tighter)
    result |= {f"L_{k}": float(est.bound(k).mean()) for k in loose}
    result |= {f"loose_{k}": mean for k, (mean, _) in loose.items()}
    result |= {f"loose_{k}_error": error for k, (_, error) in loose.items()}
    gap, error = mean_and_error(both.gap)
    result |= {"lower": float(both.lower.mean()), "upper": float(both.upper.mean()), "gap": gap, "gap_error": error}
    return result | {"acceptance": float(tighter.diagnostics["acceptance"].mean()), "simulated": len(both.gap)}


def table(found: Cells) -> str:
    """L_K and its looseness, one row per K, beside the paper's; then the BDMC bounds."""
    out = []
    for (objective,), r in cells.group_cells(found, "objective").items():
        result, lines = r[0]["result"], []
        ks = sorted(int(key[2:]) for key in result if key.startswith("L_"))
        for k in [*(k for k in ks if f"{k}".rstrip("0") in "125"), *(k for k in PUBLISHED if k > ks[-1])]:
            theirs = PUBLISHED.get(k, ())
            ours = [f"{result[f'L_{k}']:.2f}", format_looseness(result, k)] if k in ks else ["", ""]
            lines.append(
                [k, *ours, f"{theirs[1]:.2f}" if theirs else "", f"{theirs[0] - theirs[1]:.2f}" if theirs else ""]
            )
        out.append(
            f"**{objective}**: log p(x) by annealing {-result['nll']:.2f} ± {result['nll_std_error']:.2f} over "
            f"{result['num_data']} images ({result['unreliable']} unreliable; acceptance {result['acceptance']:.2f})"
        )
        out.append(cells.markdown(("K", "L_K", "looseness", "Wu et al.: L_K", "looseness"), lines))
        out.append(
            f"log p(x) of {result['simulated']} simulated data lies between {result['lower']:.2f} and "
            f"{result['upper']:.2f}: a gap of {result['gap']:.3f} ± {result['gap_error']:.3f} nats."
        )
    return "\n\n".join(out)


def format_looseness(result: dict[str, Any], k: int) -> str:
    """The difference between annealing and L_k, with its standard error."""
    return f"{result[f'loose_{k}']:.2f} ± {result[f'loose_{k}_error']:.2f}"


def draw_figures(found: Cells, folder: Path) -> None:
    """L_K by K with the annealed estimate, and the BDMC bounds."""
    run_folder = Path(found[0]["folder"])
    if (run_folder / "annealed.json").exists():
        tighter, est = (load_estimate(run_folder / f"{name}.json") for name in ("annealed", "log_marginal"))
        plots.looseness_curve(tighter, est).savefig(folder / "annealing.png")
        plots.bracket(Bracket.load(run_folder / "bracket.json")).savefig(folder / "bracket.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figures."""
    draw_figures(*cells.run("annealing", Settings, ("objective", "seed"), compute, table, SMOKE, __doc__, args))


if __name__ == "__main__":
    main()
