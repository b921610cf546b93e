"""scikit-learn's tables of real, count, binary and categorical columns with values removed at random: log p(x_observed)
and imputed values (Mattei and Frellsen 2019, arXiv 1812.02633), compared with independent columns, which impute mean or
mode, and with scikit-learn's imputers on the same rows: chained Bayesian ridge regressions (IterativeImputer) and the
mean of five nearest rows (KNNImputer), of categories rounded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.experimental import enable_iterative_imputer  # noqa: F401  without it the next line fails
from sklearn.impute import IterativeImputer, KNNImputer
from torch import Tensor
from torch import nn as tnn

from experiments.cells import Cells, Workspace, estimate_summary, group_cells, markdown, mean, run, standard_error
from ppvae import data, fit, likelihoods, nn
from ppvae.evaluation import impute
from ppvae.models import TableVAE
from ppvae.plots.style import BLUE, FAINT, figure, styled


@dataclass(frozen=True)
class Settings:
    """The tables, the share of removed values, and the training budget."""

    tables: tuple[str, ...] = ("wine", "diabetes", "breast_cancer")
    seeds: tuple[int, ...] = (0, 1, 2)
    missing: float = 0.3
    latent: int = 4
    hidden: tuple[int, ...] = (32,)
    epochs: int = 1000
    patience: int = 100
    lr: float = 3e-3
    particles: int = 5000


SMOKE = {"tables": ("wine",), "seeds": (0,), "hidden": (8,), "epochs": 2, "particles": 100}
COUNTS = ("age", "s1", "magnesium")


def load_table(name: str, missing: float) -> tuple[Tensor, Tensor, list[likelihoods.Column]]:
    """(rows in a fixed random order with the target, mask of removed values, column types)."""
    held: Any = getattr(datasets, f"load_{name}")(**({"scaled": False} if name == "diabetes" else {}))
    x, columns = torch.from_numpy(np.column_stack([held.data, held.target])).float(), []
    for d, column in enumerate([*held.feature_names, "target"]):
        codes = x[:, d].unique()
        if len(codes) <= 3:  # sex, diagnosis, cultivar
            x[:, d] = torch.searchsorted(codes, x[:, d].contiguous()).float()
        kind: Any = {2: ("binary",), 3: ("categorical", 3)}.get(len(codes), ("count" if column in COUNTS else "real",))
        columns.append(likelihoods.Column(*kind))
    generator = torch.Generator().manual_seed(0)
    x = x[torch.randperm(len(x), generator=generator)]
    removed = torch.rand(x.shape, generator=generator) < missing
    removed[removed.all(1), 0] = False
    return x, removed, columns


def fit_independent_columns(x: Tensor, columns: list[likelihoods.Column]) -> likelihoods.Mixed:
    """A likelihood that does not depend on z, fitted to each column."""
    net = nn.mlp(1, likelihoods.table_outputs(columns), hidden=())
    tnn.init.zeros_(net[0].weight)  # type: ignore[arg-type]
    nn.set_output_bias(net, likelihoods.marginals(columns, x))
    return likelihoods.Mixed(net, columns, floor=0.0)


def impute_by_peers(train: Tensor, test: Tensor, unit: Tensor, discrete: Tensor, seed: int) -> dict[str, Tensor]:
    """The test rows [N, columns] filled in by each of scikit-learn's imputers, fitted to the training rows."""
    peers = {"chained": IterativeImputer(max_iter=50, tol=1e-3, random_state=seed), "nearest": KNNImputer()}
    largest = train.nan_to_num(0.0).amax(0)
    out = {}
    for name, peer in peers.items():
        filled = torch.from_numpy(peer.fit((train / unit).numpy()).transform((test / unit).numpy())).float() * unit
        out[name] = torch.where(discrete, torch.minimum(filled.round().clamp(min=0), largest), filled)
    return out


def compute(s: Settings, workspace: Workspace, table: str, seed: int) -> dict[str, Any]:
    """Trains on the observed values of the training rows; evaluates observed and removed values of the test rows."""
    whole, removed, columns = load_table(table, s.missing)
    cuts = (int(0.6 * len(whole)), int(0.75 * len(whole)))
    real, count = (torch.tensor([c.kind == kind for c in columns]) for kind in ("real", "count"))
    known = whole.masked_fill(removed, torch.nan)[: cuts[0]]
    centre, spread = known.nanmean(0), (known - known.nanmean(0)).square().nanmean(0).sqrt()
    whole = torch.where(real, (whole - centre) / spread, whole)
    unit = torch.where(count, spread, 1.0)
    parts = whole.masked_fill(removed, torch.nan).tensor_split(cuts)
    train, valid, test = (data.with_missing(part, name=table) for part in parts)
    baseline = fit_independent_columns(parts[0], columns)
    torch.manual_seed(seed)
    vae = TableVAE.from_data(parts[0], columns, latent=s.latent, hidden=s.hidden, floor=0.05)
    trained = fit(
        vae.model, vae.guide, train, valid=valid, optimizer=functools.partial(torch.optim.AdamW, lr=s.lr), seed=seed,
        epochs=s.epochs, patience=s.patience, device=workspace.device, directory=workspace.folder, resume=True,
    )  # fmt: skip
    filled = impute(trained.model, trained.guide, test, num_particles=s.particles, draws=1000)
    est, binary = filled.estimate, torch.tensor([c.kind == "binary" for c in columns])
    gain = est.log_px - baseline(torch.zeros(len(test), 1)).log_prob(parts[2]).detach()
    answer, removed, result = whole[cuts[1] :], removed[cuts[1] :], estimate_summary(est) | {"gain": float(gain.mean())}
    own = torch.where(binary, filled.mean.round(), filled.mean)
    own = torch.where(own.isnan(), filled.values.mode(0).values, own)  # the most frequent of a category's codes
    modes = torch.stack([column[~column.isnan()].mode().values for column in parts[0].T])
    alone = torch.where(real, 0.0, torch.where(count, centre, modes)).expand(own.shape)
    peers = impute_by_peers(parts[0], parts[2], unit, ~real & ~count, seed)
    for who, guess in (("", own), ("alone_", alone), *((f"{name}_", filled) for name, filled in peers.items())):
        result[f"{who}rmse"] = float(((guess - answer) / unit)[removed & (real | count)].square().mean().sqrt())
        result[f"{who}wrong"] = float((guess != answer)[removed & ~real & ~count].float().mean())
    np.savez(workspace.folder / "shown.npz", answer=answer[removed & real], guess=own[removed & real])
    return result | {"gain_error": float(gain.std()) / len(gain) ** 0.5}


def table(cells: Cells) -> str:
    """One row per table: log p of observed values, and errors of imputed ones."""
    header = (
        "table", "seeds", "NLL", "independent", "gain", "RMSE", "of means", "of chained", "of nearest", "wrong",
        "of modes", "of chained", "of nearest", "unreliable",
    )  # fmt: skip
    lines = []
    for (name,), r in group_cells(cells, "table").items():
        nll, gain = f"{mean(r):.2f} ± {standard_error(r):.2f}", f"{mean(r, 'gain'):+.2f} ± {mean(r, 'gain_error'):.2f}"
        who = ("", "alone_", "chained_", "nearest_")
        errors = (f"{mean(r, f'{name}{key}'):.3f}" for key in ("rmse", "wrong") for name in who)
        doubt = f"{100 * mean(r, 'unreliable') / mean(r, 'num_data'):.0f} %"
        lines.append((name, len(r), nll, f"{mean(r) + mean(r, 'gain'):.2f}", gain, *errors, doubt))
    return markdown(header, lines)


@styled
def draw_figure(cells: Cells) -> Any:
    """Removed real values of the test rows and their imputations, in standard deviations of the column."""
    rows = group_cells([c for c in cells if (Path(c["folder"]) / "shown.npz").exists()], "table")
    fig = figure(3.2 * len(rows), 3.3)
    for ax, ((name,), r) in zip(fig.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        held = np.load(Path(r[0]["folder"]) / "shown.npz")
        ax.axline((0, 0), slope=1, color=FAINT, lw=1)
        ax.plot(held["answer"], held["guess"], ".", color=BLUE, alpha=0.4, markersize=4)
        ax.set(
            title=f"{name}, {len(held['guess'])} cells", xlabel="removed", ylabel="imputed", xlim=(-3, 4), ylim=(-3, 4)
        )
    return fig


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    cells, folder = run("tables", Settings, ("table", "seed"), compute, table, SMOKE, __doc__, args)
    draw_figure(cells).savefig(folder / "tables.png")


if __name__ == "__main__":
    main()
