"""Pictures of the catalogue: densities and draws of parts, graphs of models, drawn from the constructors of the tests.

`python docs/hooks/pictures.py FOLDER` writes one PNG a part.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import networkx
import torch
from pyro.infer.inspect import get_model_relations

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from tests.laws.latents import perturbed  # noqa: E402
from tests.laws.parts import FEATURES, LIKELIHOODS, POINT, POSTERIORS, PRIORS, Nets  # noqa: E402
from tests.laws.test_model_laws import MODELS  # noqa: E402

COLORS = ["#3f51b5", "#ff7043", "#26a69a"]
MIXTURES = dict.fromkeys(("Mixture of one channel", "Mixture of three channels"), "MixtureOfDiscretizedLogistics")
GRAPHS = {  # the case of the tests that a model is drawn from
    "LinearGaussian": "factor analysis", "GaussianMixture": "mixture", "ConditionalVAE": "conditional VAE",
    "SemiSupervisedVAE": "semi-supervised VAE", "HierarchicalVAE": "hierarchical VAE", "LadderVAE": "ladder VAE",
    "TopDownVAE": "top-down VAE", "DeepMarkovModel": "deep Markov model", "TopicModel": "topics, logistic-normal",
    "CountVAE": "counts", "GaussianProcessVAE": "Gaussian process VAE",
    "MultimodalVAE": "multimodal VAE, product of experts", "QuantizedVAE": "quantised VAE", "TableVAE": "table",
    "DeepMixture": "deep mixture",
}  # fmt: skip


def main(folder: Path) -> None:
    """Writes every picture."""
    warnings.simplefilter("ignore")
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"})
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Callable[[Any], None]] = {}
    for name, part in PRIORS.items():
        drawn.setdefault(f"priors.{name.split()[0]}", lambda ax, name=name, part=part: prior(ax, name, part))
    for name, part in (POSTERIORS | POINT).items():
        drawn.setdefault(f"posteriors.{name.split()[0]}", lambda ax, part=part: posterior(ax, part))
    for name, case in LIKELIHOODS.items():
        drawn.setdefault(
            f"likelihoods.{MIXTURES.get(name, name.split()[0])}", lambda ax, case=case: likelihood(ax, case)
        )
    for name, case in GRAPHS.items():
        drawn[f"models.{name}"] = lambda ax, case=case: graph(ax, *MODELS[case].pair())
    drawn["models.VAE"] = lambda ax: graph(ax, *vae())
    for name, draw in drawn.items():
        torch.manual_seed(0)
        figure, ax = plt.subplots(figsize=(3.4, 2.3), layout="constrained")
        draw(ax)
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)


def prior(ax: Any, name: str, part: Any) -> None:
    """Draws of a prior with random parameters, and its density where it has one in the plane."""
    if name == "GaussianProcess":
        times = torch.linspace(0, 6, 60)[None].double()
        paths = perturbed(part.make(1))(context=times).sample((4,)).reshape(4, -1)
        ax.plot(times[0], paths.T)
        ax.set(xlabel="time", ylabel="z", title="four draws")
        return
    size = {"sphere": 3, "simplex": 3}.get(part.kind, 8 if part.kind == "discrete" else 2)
    given = {} if part.context is None else {"context": torch.tensor(1)}
    d = perturbed(part.make(size), 0.3 if part.kind == "real" else 0.6)(**given)
    latents(ax, [d], part.kind, density=True)


def posterior(ax: Any, part: Any) -> None:
    """q(z | x) for three data, with random parameters."""
    size = {"sphere": 3, "simplex": 3}.get(part.kind, 8 if part.kind == "discrete" else 2)
    module = perturbed(part.make(size), 0.35)
    data = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 1, 1]]).double()[:, :FEATURES]
    given = [{} if part.context is None else {"context": torch.tensor([i])} for i in (3, 1, 4)]
    latents(ax, [module(x[None], **c) for x, c in zip(data, given, strict=True)], part.kind, density=False)


def latents(ax: Any, distributions: list[Any], space: str, *, density: bool) -> None:
    """Draws of one or more distributions over z."""
    discrete = space == "discrete"
    for color, d in zip(COLORS, distributions, strict=False):
        z = d.sample((24,) if discrete else (1000,)).reshape(24 if discrete else 1000, -1).detach()
        if discrete and len(distributions) == 1:
            ax.imshow(z, cmap="Greys", interpolation="nearest", aspect="auto")
            ax.set(xlabel="element of z", ylabel="draw")
        elif discrete:
            offset = COLORS.index(color) * 0.25
            ax.bar(torch.arange(z.shape[-1]) + offset, z.double().mean(0), 0.25, color=color)
            ax.set(xlabel="element of z", ylabel="mean")
        elif space == "simplex":
            ax.plot([0, 1, 0.5, 0], [0, 0, math.sqrt(3) / 2, 0], color="#999", lw=0.8)
            ax.plot(z[:, 1] + z[:, 2] / 2, z[:, 2] * math.sqrt(3) / 2, ".", ms=2, color=color, alpha=0.5)
            ax.set(aspect="equal", title="draws on the simplex")
            ax.axis("off")
        elif space == "sphere":
            ax.plot(z[z[:, 2] > 0, 0], z[z[:, 2] > 0, 1], ".", ms=2, color=color, alpha=0.6)
            ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="#999", lw=0.8))
            ax.set(aspect="equal", title="draws, the near half of the sphere")
            ax.axis("off")
        else:
            ax.plot(z[:, 0], z[:, 1], ".", ms=2, color=color, alpha=0.5)
            ax.set(xlabel="z1", ylabel="z2")
            if density:
                contours(ax, d, z)
    if space == "real":
        lines = [torch.as_tensor(line.get_xydata()) for line in ax.lines]
        low, high = torch.cat(lines).quantile(torch.tensor([0.003, 0.997]).double(), 0)
        ax.set(xlim=(low[0] - 0.3, high[0] + 0.3), ylim=(low[1] - 0.3, high[1] + 0.3))


def contours(ax: Any, d: Any, z: torch.Tensor) -> None:
    """Lines of equal density over the region of the draws z [n, 2]."""
    ends = z.quantile(torch.tensor([0.003, 0.997]).double(), 0)
    across, up = (torch.linspace(*ends[:, i].tolist(), 80).double() for i in (0, 1))
    density = d.log_prob(torch.cartesian_prod(across, up)).detach().exp().reshape(80, 80).T
    ax.contour(across, up, density, 6, colors="#333", linewidths=0.6)


def likelihood(ax: Any, case: Any) -> None:
    """Histograms of draws of one element of x, for three values of z."""
    event = (4,) if case.dims == 1 else (case.dims,)
    try:
        module = perturbed(case.make(Nets(event)), 0.4)
    except (ValueError, RuntimeError, TypeError, IndexError):
        event = (3, 4, 4)
        module = perturbed(case.make(Nets(event)), 0.4)
    z = torch.tensor([[2.0, 0, -1], [-1, 1.5, 0], [0.5, -2, 1]]).double()
    with torch.no_grad():
        d = module(z, **case.given(3))
        x = d.sample((2000,)).reshape(2000, 3, -1)[..., 0]
    whole = bool((x == x.round()).all())
    top = float(x.double().quantile(0.99))
    bins: Any = torch.arange(-0.5, max(top, 2) + 1.5) if whole and top < 60 else 40
    if not whole:
        x = x.clamp(*x.flatten().quantile(torch.tensor([0.005, 0.995]).double()))
    ax.hist(x.numpy(), bins=bins, color=COLORS, density=True, label=["z = a", "z = b", "z = c"])
    ax.set(xlabel="one element of x", ylabel="p(x | z)")
    ax.legend(frameon=False)


def vae() -> tuple[Any, Any, Any]:
    """The plain pair, as a graph."""
    from ppvae import VAE, likelihoods, nn, posteriors, priors

    pair = VAE(
        priors.StandardNormal(2), likelihoods.Bernoulli(nn.mlp(2, 4)), posteriors.DiagonalNormal(nn.mlp(4, 4))
    ).double()
    return pair.model, pair.guide, (torch.ones(3, 4).double(),)


def graph(ax: Any, model: Any, guide: Any, batch: Any) -> None:
    """The sites of a model and what each depends on; observed ones are shaded, the plate is over data."""
    relations = get_model_relations(model, batch)
    edges = relations["sample_sample"]
    g = networkx.DiGraph([(a, b) for b, parents in edges.items() for a in parents if a != b])
    g.add_nodes_from(edges)
    layers = list(networkx.topological_generations(g))
    place = {n: (i - (len(row) - 1) / 2, -k) for k, row in enumerate(layers) for i, n in enumerate(sorted(row))}
    for a, b in g.edges:
        curved = "arc3,rad=0.35" if place[a][0] == place[b][0] and place[a][1] - place[b][1] > 1 else "arc3"
        style = {"arrowstyle": "-|>", "shrinkA": 13, "shrinkB": 13, "connectionstyle": curved, "color": "#555"}
        ax.annotate("", place[b], place[a], arrowprops=style)
    for n, (x, y) in place.items():
        ax.plot(x, y, "o", ms=25, mfc="#c5cae9" if n in relations["observed"] else "white", mec=COLORS[0], mew=1.2)
        ax.text(x, y, n, ha="center", va="center", fontsize=7 if len(n) < 4 else 4.5)
    wide, deep = max(x for x, _ in place.values()), len(layers) - 1
    box = (-wide - 0.6, -deep - 0.75), 2 * wide + 1.2, deep + 1.25
    ax.add_patch(plt.Rectangle(*box, fill=False, color="#999", lw=0.8))
    ax.text(wide + 0.55, -deep - 0.7, "data", ha="right", va="bottom", color="#777", fontsize=6)
    ax.set(xlim=(-max(wide, 1) - 0.8, max(wide, 1) + 0.8), ylim=(-deep - 0.9, 0.7))
    ax.axis("off")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
