"""Topic models on a planted corpus and on digits. The corpus is made, not found: 25 words on a 5 x 5 grid and ten
topics, its rows and columns (Griffiths and Steyvers 2004), so that what there is to find is known. A digit is a
document whose words are its 64 pixels, each as often as it is dark. ProdLDA is a product of experts in the place of
the mixture; a topic is recovered where less than a tenth of its mass is misplaced.

"planted" and "scikit-learn LDA" are `TopicModel`s whose topics are given, the planted ones and those that scikit-
learn's LatentDirichletAllocation finds: only their guide is trained, so that log p(x) of all rows is estimated in one
way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import LatentDirichletAllocation
from torch import Tensor
from torch import nn as tnn

from experiments.cells import Cells, Here, collected, markdown, mean, of_estimate, run, standard_error, train, verdict
from ppvae import data, log_marginal, nn, posteriors, priors
from ppvae.evaluation import coherence, perplexity
from ppvae.models import TopicModel
from ppvae.plots.style import figure, styled

PLANTED, LDA = "planted", "scikit-learn LDA"


@dataclass(frozen=True)
class Settings:
    """The corpora, and the budget that every model gets."""

    sources: tuple[str, ...] = ("bars", "digits")
    models: tuple[str, ...] = ("LogisticNormal", "Dirichlet", "ProdLDA", LDA, PLANTED)
    seeds: tuple[int, ...] = (0, 1, 2)
    topics: int = 10
    concentration: float = 0.3
    length: int = 60
    num_train: int = 2000
    num_test: int = 500
    hidden: tuple[int, ...] = (64,)
    epochs: int = 150
    lr: float = 5e-3
    particles: int = 1000
    top: int = 5


SMOKE = {"sources": ("bars",), "seeds": (0,), "num_train": 60, "num_test": 20, "epochs": 1, "particles": 25}


def bars(s: Settings) -> Tensor:
    """The planted topics, [10, 25]: a row or a column each, and a hundredth of its mass anywhere."""
    grid = torch.eye(5)
    rows = torch.cat([grid[:, :, None].expand(5, 5, 5), grid[:, None, :].expand(5, 5, 5)]).flatten(1)
    return 0.99 * rows / 5 + 0.01 / 25


def corpus(s: Settings, source: str) -> list[Tensor]:
    """Counts of words for training, validation and test."""
    if source == "digits":
        return [(16 * part.read()).round()[: s.num_train] for part in data.load("digits")]
    torch.manual_seed(0)
    out = []
    for size in (s.num_train, s.num_test, s.num_test):
        theta = torch.distributions.Dirichlet(torch.full((10,), s.concentration)).sample((size,))
        length = 1 + torch.poisson(torch.full((size,), s.length - 1.0))
        words = torch.multinomial(theta @ bars(s), int(length.max()), replacement=True)
        there = torch.arange(words.shape[1]) < length[:, None]
        out.append(torch.zeros(size, 25).scatter_add_(1, words, there.float()))
    return out


def pair(s: Settings, name: str, x: Tensor, seed: int) -> TopicModel:
    """The model by its name."""
    k, words = s.topics, x.shape[1]
    encoder = tnn.Sequential(nn.Log1p(), nn.mlp(words, 2 * k, hidden=s.hidden))
    near = priors.LogisticNormal.like_dirichlet(k, s.concentration, learned=True)
    if name == "ProdLDA":
        return TopicModel(near, tnn.Linear(k, words), posteriors.LogisticNormal(encoder))
    topics = nn.Topics(k, words)
    if name == "LogisticNormal":
        return TopicModel(near, topics, posteriors.LogisticNormal(encoder))
    encoder = tnn.Sequential(nn.Log1p(), nn.mlp(words, k, hidden=s.hidden))
    prior = priors.Dirichlet(k, s.concentration, learned=name == "Dirichlet")
    if name in (PLANTED, LDA):
        found = bars(s) if name == PLANTED else torch.from_numpy(by_lda(s, x, seed))
        del topics.logits
        topics.register_buffer("logits", found.log().float())
    return TopicModel(prior, topics, posteriors.Dirichlet(encoder, floor=0.02))


def by_lda(s: Settings, x: Tensor, seed: int) -> np.ndarray:
    """The topics of scikit-learn's LDA, [topics, words]."""
    lda = LatentDirichletAllocation(s.topics, doc_topic_prior=s.concentration, max_iter=100, random_state=seed)
    found = lda.fit(x.numpy()).components_
    return found / found.sum(1, keepdims=True)


def recovered(s: Settings, words: Tensor) -> int:
    """How many planted topics have one of their own at a total variation distance below a tenth."""
    distance = (bars(s)[:, None] - words).abs().sum(-1).numpy() / 2
    return int((distance[linear_sum_assignment(distance)] < 0.1).sum())


def compute(s: Settings, here: Here, source: str, model: str, seed: int) -> dict[str, Any]:
    """Trains one model; its perplexity on test documents, and the coherence of its topics in them."""
    fitted, valid, test = corpus(s, source)
    torch.manual_seed(seed)
    made = pair(s, model, fitted, seed)
    trained = train(made, fitted, valid, here, epochs=s.epochs, lr=s.lr, seed=seed)
    est = log_marginal(trained.model, trained.guide, test, num_particles=s.particles, seed=seed)
    words = made.words.cpu()
    np.savez(here.folder / "shown.npz", words=words)
    found = {"perplexity": perplexity(est.log_px, test), "npmi": float(coherence(words, test, s.top).mean())}
    return of_estimate(est) | found | ({"recovered": float(recovered(s, words))} if source == "bars" else {})


def table(cells: Cells) -> str:
    """One row a model, a table a corpus."""
    header = ("corpus", "model", "seeds", "perplexity", "test NLL", "gain on LDA", "NPMI", "recovered", "not reliable")
    lines = []
    for (source, model), r in (rows := collected(cells, "source", "model")).items():
        lda = rows.get((source, LDA))
        gain = verdict(r, lda) if lda and r is not lda else ""
        found = f"{mean(r, 'recovered'):.1f} of 10" if "recovered" in r[0]["result"] else ""
        doubt = f"{100 * mean(r, 'unreliable') / mean(r, 'num_data'):.0f} %"
        nll = f"{mean(r):.2f} ± {standard_error(r):.2f}"
        lines.append(
            (source, model, len(r), f"{mean(r, 'perplexity'):.2f}", nll, gain, f"{mean(r, 'npmi'):.2f}", found, doubt)
        )
    return markdown(header, lines)


@styled
def picture(cells: Cells) -> Any:
    """The topics as pictures, a row a model, of the first seed."""
    here = [c for c in cells if (Path(c["folder"]) / "shown.npz").exists()]
    rows = collected(here, "source", "model")
    fig = figure(7.5, 0.85 * len(rows))
    for axes, ((source, model), r) in zip(fig.subplots(len(rows), 10, squeeze=False), rows.items(), strict=True):
        words = np.load(Path(r[0]["folder"]) / "shown.npz")["words"]
        side = int(words.shape[1] ** 0.5)
        for ax, topic in zip(axes, words, strict=True):
            ax.imshow(topic.reshape(side, side), cmap="Greys", vmin=0)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
        axes[0].set_title(f"{source}, {model}", loc="left")
    return fig


def main(args: list[str] | None = None) -> None:
    """Fills the table and draws the topics."""
    cells, folder = run("topics", Settings, ("source", "model", "seed"), compute, table, SMOKE, __doc__, args)
    picture(cells).savefig(folder / "topics.png")


if __name__ == "__main__":
    main()
