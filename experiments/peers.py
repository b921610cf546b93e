"""Other libraries beside ours: the same data, splits and sizes in one run; log p(x) of test data, and CPU seconds.

- images: a VAE, IWAE-5 and a VAE with a VampPrior on binarised digits; networks, batches and steps are alike. Pythae
  trains in its own trainer and estimates log p(x) with its own `get_nll`; what it trained is evaluated by
  `log_marginal`, too: the two columns are two estimators of one number.
- cells: counts of human cells that celltypist ships (`sample_cell_by_gene.csv`), the most variable genes of the
  training cells; negative binomials with a latent library size, by `CountVAE` and by scvi-tools' `SCVI`, both with one
  hidden layer of 128 and 10 latents. All stop early on validation data. "Defaults" are those of scvi-tools: dropout,
  batch normalisation, and a warm-up of the KL over 400 epochs, more than early stopping lets it train on 391 cells. "As
  ours" has none of these, and our learning rate, batch, patience and Adam's eps; on seed 0 batch normalisation without
  the other two cost 46 nats of its validation ELBO. Log p(x) of what it trained is estimated by its own
  `get_marginal_ll` and, of its networks as a pair in Pyro, by `log_marginal`: both count the constants of the negative
  binomial, and integrate over z and the library size. The prior of library sizes is fitted to all cells by scvi-tools,
  test cells among them, and to training cells by ours.
- text: paragraphs of the Python language reference, as in `topics`; topics are evaluated by `log_marginal`, those of
  scikit-learn with a posterior that is fitted to them.
- table: factor analysis of standardised wine rows; log p(x) is known in closed form.

What is not installed is skipped by name: `pip install pythae scvi-tools statsmodels celltypist`, the last for its data
alone (`--no-deps`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn import decomposition
from torch import Tensor

from experiments import cells, factor_analysis, topics
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.data.loader import data_digest
from ppvae.data.unsplit import permutation_split
from ppvae.models import CountVAE, LinearGaussian
from ppvae.training.run import Run

OURS = "ppvae"
LR, BATCH, PATIENCE = 1e-3, 100, 45  # of cells; the patience is scvi-tools' own default


@dataclass(frozen=True)
class Settings:
    """The rows, what/who, and sizes of images and cells; topics and factor analysis have those of their experiments."""

    rows: tuple[str, ...] = (
        f"VAE/{OURS}", "VAE/Pythae", f"IWAE-5/{OURS}", "IWAE-5/Pythae", f"VampPrior/{OURS}", "VampPrior/Pythae",
        f"cells/{OURS}", "cells/scvi-tools, defaults", "cells/scvi-tools, as ours", f"text/{OURS}, LDA",
        f"text/{OURS}, ProdLDA", "text/scikit-learn, LDA",
        f"table/{OURS}", "table/scikit-learn", "table/statsmodels",
    )  # fmt: skip
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "digits"
    num_train: int = 1077
    num_test: int = 200
    epochs: int = 50
    hidden: tuple[int, ...] = (200,)
    latent: int = 8
    components: int = 100
    particles: int = 1000
    genes: int = 300
    cell_epochs: int = 400


SMOKE = {"rows": (f"VAE/{OURS}", "VAE/Pythae", f"table/{OURS}", "table/scikit-learn"), "seeds": (0,)}
SMOKE |= {"num_train": 100, "num_test": 5, "epochs": 1, "hidden": (8,), "latent": 2, "components": 5, "particles": 50}


def summary(log_px: Tensor, test: Any) -> dict[str, Any]:
    """What `cells.estimate_summary` says, of log p(x) of each datum that another library computed."""
    log_px = log_px.detach().double()
    return {
        "nll": -float(log_px.mean()), "nll_std_error": float(log_px.std()) / len(log_px) ** 0.5,
        "num_data": len(log_px), "unreliable": 0, "digest": data_digest(test if isinstance(test, tuple) else (test,)),
        "groups": [round(float(g.mean()), 5) for g in log_px.tensor_split(min(cells.GROUPS, len(log_px)))],
    }  # fmt: skip


def build_images(s: Settings, what: str, x: Tensor, seed: int) -> VAE:
    """The VAE of images, its decoder's bias at the mean image."""
    torch.manual_seed(seed)
    dims = x.shape[1]
    decoder = nn.mlp(s.latent, dims, hidden=s.hidden[::-1])
    nn.set_output_bias(decoder, x.mean(0).clamp(1e-3, 1 - 1e-3).logit())
    posterior = posteriors.DiagonalNormal(nn.mlp(dims, 2 * s.latent, hidden=s.hidden))
    vamp = what == "VampPrior"
    prior = priors.VampPrior.from_data(posterior, x, s.components) if vamp else priors.StandardNormal(s.latent)
    return VAE(prior, likelihoods.Bernoulli(decoder), posterior)


def compute_images(s: Settings, workspace: Workspace, what: str, who: str, seed: int) -> dict[str, Any]:
    """Trains by ours or by Pythae; log p(x) by both estimators of networks that Pythae trained."""
    splits = zip(data.load(s.data, workspace.root, binarize="fixed"), (s.num_train, 1000, s.num_test), strict=True)
    train, valid, test = (part.head(min(n, len(part))).read() for part, n in splits)
    vae = build_images(s, what, train, seed)
    if who == OURS:
        objective = objectives.IWAE(5) if what == "IWAE-5" else objectives.ELBO()
        adam = {"lr": 1e-3, "scheduler": None, "seed": seed, "objective": objective}
        run = cells.train(vae, train, valid, workspace, epochs=s.epochs, **adam)
        found = {"train_seconds": train_seconds(run)}
    else:
        vae, found = train_by_pythae(s, what, vae, (train, valid, test), workspace.folder, seed)
    return estimate(s, vae, test, seed) | found


def train_seconds(run: Run) -> float:
    """CPU seconds of all epochs."""
    return float(sum(epoch["cpu_seconds"] for epoch in run.history))


def estimate(s: Settings, pair: Any, test: Any, seed: int) -> dict[str, Any]:
    """log p(x) by `log_marginal`, and its seconds."""
    start = time.process_time()
    est = log_marginal(pair.model, pair.guide, test, num_particles=s.particles, seed=seed, proposal="guide")
    return cells.estimate_summary(est) | {"own_nll": est.nll, "own_seconds": time.process_time() - start}


def train_by_pythae(
    s: Settings, what: str, vae: VAE, splits: tuple[Tensor, ...], folder: Path, seed: int
) -> tuple[VAE, dict[str, Any]]:
    """Trains the networks of the VAE by Pythae; returns them as a VAE of ours, and what Pythae says of them."""
    topics.installed("pythae")
    from pythae import models, trainers
    from pythae.data.datasets import BaseDataset
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    encoder, decoder = BaseEncoder(), BaseDecoder()
    encoder.net, decoder.net = vae.posterior.net, vae.likelihood.net

    def encode(x: Tensor) -> Any:
        loc, log_scale = encoder.net(x).chunk(2, -1)
        return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    encoder.forward, decoder.forward = encode, lambda z: ModelOutput(reconstruction=decoder.net(z).sigmoid())
    (train, valid, test), dims = splits, splits[0].shape[1]
    common: dict[str, Any] = {"input_dim": (dims,), "latent_dim": s.latent, "reconstruction_loss": "bce"}
    if what == "IWAE-5":
        model: Any = models.IWAE(models.IWAEConfig(number_samples=5, **common), encoder, decoder)
    elif what == "VampPrior":
        model = models.VAMP(models.VAMPConfig(number_components=s.components, **common), encoder, decoder)
    else:
        model = models.VAE(models.VAEConfig(**common), encoder, decoder)
    config = trainers.BaseTrainerConfig(
        output_dir=str(folder), num_epochs=s.epochs, per_device_train_batch_size=100, per_device_eval_batch_size=1000,
        learning_rate=1e-3, optimizer_cls="Adam", seed=seed, no_cuda=True, train_dataloader_num_workers=0,
        eval_dataloader_num_workers=0,
    )  # fmt: skip
    sets = (BaseDataset(x, torch.zeros(len(x))) for x in (train, valid))
    trainer, start = trainers.BaseTrainer(model, *sets, training_config=config), time.process_time()
    trainer.train()
    seconds, start = time.process_time() - start, time.process_time()
    model.eval()
    with torch.no_grad():
        nll = -float(model.get_nll(test, n_samples=s.particles, batch_size=min(1000, s.particles)))
        times = {"own_nll": nll, "own_seconds": time.process_time() - start, "train_seconds": seconds}
        if what == "VampPrior":
            inputs = model.pseudo_inputs(model.idle_input)
            vae = VAE(priors.VampPrior(vae.posterior, inputs), vae.likelihood, vae.posterior)
    return vae, times


def read_cells(s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [cells, genes] for training, validation and test."""
    path = topics.installed("celltypist") / "data" / "samples" / "sample_cell_by_gene.csv"
    with path.open() as file:
        columns = range(1, len(file.readline().split(",")))
    counts = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1, usecols=columns)).round().float()
    rows = [torch.from_numpy(part) for part in permutation_split(len(counts))]
    genes = counts[rows[0]].log1p().var(0).topk(s.genes).indices.sort().values
    train, valid, test = (counts[part][:, genes] for part in rows)
    return train, valid, test


def compute_cells(s: Settings, workspace: Workspace, what: str, who: str, seed: int) -> dict[str, Any]:
    """Negative binomials of genes with a latent library size."""
    splits = read_cells(s)
    if who != OURS:
        return train_by_scvi(s, splits, who.endswith("as ours"), seed)
    train, valid, test = map(with_batch, splits)
    torch.manual_seed(seed)
    pair = CountVAE(
        priors.StandardNormal(10),
        likelihoods.NegativeBinomial(nn.mlp(11, s.genes, hidden=(128,)), concentration=(s.genes,), library=True),
        posteriors.DiagonalNormal(nn.mlp(s.genes + 1, 20, hidden=(128,))), 1, CountVAE.library_of(*train),
        posteriors.DiagonalNormal(nn.mlp(s.genes + 1, 2, hidden=(128,))),
    )  # fmt: skip
    run = cells.train(pair, train, valid, workspace, epochs=s.cell_epochs, lr=LR, seed=seed, patience=PATIENCE)
    return estimate(s, run, test, seed) | {"train_seconds": train_seconds(run)}


def with_batch(x: Tensor) -> tuple[Tensor, Tensor]:
    """Counts, and the one batch that all cells are of."""
    return x, torch.zeros(len(x), dtype=torch.long)


def pair_of_scvi(module: Any) -> Any:
    """SCVI's trained networks as a model and a guide in Pyro: p(z) p(log l) NB(x; l * shares(z), exp(px_r))."""

    def model(x: Tensor, batch: Tensor) -> None:
        pyro.module("scvi", module)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(module.n_latent), 1.0).to_event(1))
            scale = module.library_log_vars[0].sqrt()
            log_library = pyro.sample("log_library", dist.Normal(module.library_log_means[0], scale).to_event(1))
            _, _, mean, _ = module.decoder("gene", z, log_library, batch[:, None])
            concentration = module.px_r.exp()
            fn = dist.NegativeBinomial(concentration, logits=mean.log() - concentration.log())
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(x: Tensor, batch: Tensor) -> None:
        pyro.module("scvi", module)
        q_z, q_library = (net(x.log1p(), batch[:, None])[0] for net in (module.z_encoder, module.l_encoder))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(q_z.loc, q_z.scale).to_event(1))
            pyro.sample("log_library", dist.Normal(q_library.loc, q_library.scale).to_event(1))

    return type("Pair", (), {"model": staticmethod(model), "guide": staticmethod(guide)})


def train_by_scvi(s: Settings, splits: tuple[Tensor, ...], as_ours: bool, seed: int) -> dict[str, Any]:
    """The same by scvi-tools; log p(x) by both estimators of what it trained."""
    topics.installed("scvi")
    import anndata
    import scvi

    scvi.settings.seed = seed
    counts = torch.cat(splits).numpy()
    table = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(table)
    sizes: dict[str, Any] = {"n_hidden": 128, "n_latent": 10, "n_layers": 1, "gene_likelihood": "nb"}
    schedule: dict[str, Any] = {}
    if as_ours:
        sizes |= {"dropout_rate": 0.0, "use_batch_norm": "none"}
        plan = {"n_epochs_kl_warmup": None, "lr": LR, "eps": 1e-8, "weight_decay": 0.0}
        schedule = {"batch_size": BATCH, "early_stopping_patience": PATIENCE, "plan_kwargs": plan}
    model = scvi.model.SCVI(table, use_observed_lib_size=False, **sizes)
    train, valid, test = np.split(np.arange(len(counts)), np.cumsum([len(x) for x in splits[:2]]))
    start = time.process_time()
    model.train(
        s.cell_epochs, accelerator="cpu", early_stopping=True, enable_progress_bar=False,
        datasplitter_kwargs={"external_indexing": [train, valid, test]}, **schedule,
    )  # fmt: skip
    seconds, start = time.process_time() - start, time.process_time()
    log_px = model.get_marginal_ll(indices=test, n_mc_samples=s.particles, return_mean=False)
    times = {"train_seconds": seconds, "own_seconds": time.process_time() - start}
    epochs = len(model.history["elbo_validation"])
    found = estimate(s, pair_of_scvi(model.module), with_batch(splits[2]), seed)
    return found | times | {"own_nll": -float(np.mean(np.asarray(log_px))), "epochs": epochs}


def compute_text(s: Settings, workspace: Workspace, what: str, who: str, seed: int) -> dict[str, Any]:
    """Topics, and a posterior over their proportions; seconds of scikit-learn are of its fit alone."""
    t, model = topics.Settings(), {"LDA": "Dirichlet", "ProdLDA": "ProdLDA"}[who.split(", ")[1]]
    train, valid, test = topics.load_corpus(t, "python")
    torch.manual_seed(seed)
    start = time.process_time()
    name = model if who.startswith(OURS) else topics.LDA
    pair = topics.build_model(t, "python", name, train, seed)
    seconds = time.process_time() - start
    run = cells.train(pair, train, valid, workspace, epochs=t.epochs, lr=t.lr, seed=seed)
    if who.startswith(OURS):
        seconds += train_seconds(run)
    return estimate(s, run, test, seed) | {"train_seconds": seconds}


def compute_table(s: Settings, workspace: Workspace, what: str, who: str, seed: int) -> dict[str, Any]:
    """Factor analysis with four factors, by SVI with the exact guide, by EM, and by L-BFGS."""
    f = factor_analysis.Settings()
    x, test = (part.double() for part in factor_analysis.load_rows("wine"))
    torch.manual_seed(seed)
    start = time.process_time()
    if who == OURS:
        pair = LinearGaussian(x.shape[1], f.latent, x.std(0))
        pair.loc.data.copy_(x.mean(0))
        pair = pair.double()
        run = cells.train(pair, x, None, workspace, epochs=f.epochs, lr=f.lr, seed=seed)
        seconds, log_px = train_seconds(run), pair.log_px(test)
    elif who == "scikit-learn":
        em = decomposition.FactorAnalysis(f.latent, tol=1e-6, max_iter=20000, svd_method="lapack").fit(x.numpy())
        seconds, log_px = time.process_time() - start, torch.from_numpy(em.score_samples(test.numpy()))
    else:
        topics.installed("statsmodels")
        from statsmodels.multivariate.factor import Factor

        start = time.process_time()
        found = Factor(x.numpy(), f.latent, method="ml").fit()
        seconds, scale = time.process_time() - start, x.std(0, correction=0)
        cov = torch.from_numpy(found.loadings @ found.loadings.T + np.diag(found.uniqueness))
        normal = torch.distributions.MultivariateNormal(x.mean(0), cov * scale[:, None] * scale)
        log_px = normal.log_prob(test)
    return summary(log_px, test) | {"own_nll": -float(log_px.mean()), "train_seconds": seconds, "own_seconds": 0.0}


COMPUTE: dict[str, Callable[..., dict[str, Any]]] = {
    "VAE": compute_images, "IWAE-5": compute_images, "VampPrior": compute_images, "cells": compute_cells,
    "text": compute_text, "table": compute_table,
}  # fmt: skip


def compute(s: Settings, workspace: Workspace, row: str, seed: int) -> dict[str, Any]:
    """One row."""
    what, who = row.split("/")
    return COMPUTE[what](s, workspace, what, who, seed)


def table(found: Cells) -> str:
    """One row per comparison and library."""
    header = (
        "task", "by", "seeds", "test NLL, own estimator", "by log_marginal", "gain on ppvae", "CPU s, training",
        "CPU s, its log p(x)",
    )  # fmt: skip
    lines = []
    for (row,), r in (rows := cells.group_cells(found, "row")).items():
        what, who = row.split("/")
        first = next(other for (name,), other in rows.items() if name.startswith(f"{what}/"))
        gain = cells.compare_rows(r, first) if first is not r else ""
        ours = "" if what == "table" else f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}"
        nlls = f"{cells.mean(r, 'own_nll'):.2f}", ours
        seconds = f"{cells.mean(r, 'train_seconds'):.1f}", f"{cells.mean(r, 'own_seconds'):.1f}"
        lines.append((what, who, len(r), *nlls, gain, *seconds))
    return cells.markdown(header, lines)


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    cells.run("peers", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
