"""Published results, row by row, beside ours and beside those of Pythae, another library's reproduction of them.

Rows are in the order of nats gained per hour. Every row is one run folder, or a chain of them: a stage continues from
the parameters of the one before it, and rows that begin alike share it, as in Table 2 of Burda et al. 2016 (arXiv
1509.00519). Our schedules are shorter than the papers': larger batches, doubly reparameterised gradients (Tucker et al.
2019, arXiv 1810.04152), cosine decay of the learning rate, matrix products in bfloat16; `--paper` takes the papers'
schedules. Dynamically binarised MNIST has 59,600 training images, as in the code of Burda et al.; parameters are those
of the last epoch, or of the best validation ELBO where a schedule says so. Fixed binarisation is ours at seed 0, not
Larochelle's file; OMNIGLOT and the split of Frey faces are ours, too. `--only ROW` computes a row, and `--again ROW`
repeats a stored one.

L_K of the guide, which papers print, and the refined estimate of log p(x) come from one call on the first
`--num-refined` test images. L_100 of all test images carries both over to the whole set: mean of L_100 over all, plus
the mean difference over the first (a difference estimator, whose standard error is given)."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from experiments import cells, iwae, table1
from experiments.cells import Cells, Workspace
from ppvae import data, generate, load, log_marginal, objectives
from ppvae.cli.common import joined_digest
from ppvae.cli.options import Data
from ppvae.evaluation import refined_log_marginal
from ppvae.factories import pairs
from ppvae.models import HierarchicalVAE
from ppvae.plots import image_grid
from ppvae.plots.style import BLUE, VERMILLION, figure, styled
from ppvae.training.run import Run

REACHED = 0.3  # nats


class Stage(NamedTuple):
    """One run of training; its learning rate falls to zero along a cosine unless `decay` is another schedule."""

    name: str
    objective: Callable[[], PyroELBO]
    epochs: int
    batch: int
    lr: float
    patience: int | None = None
    precision: str = "bf16"
    decay: Callable[[torch.optim.Optimizer], Any] | None = None

    @property
    def text(self) -> str:
        stop = f", best of validation (patience {self.patience})" if self.patience else ""
        return f"{self.name}: {self.epochs} epochs x {self.batch} at {self.lr:g}{stop}"


class Row(NamedTuple):
    """A published number, in nats or (`bits`) bits per dimension, the pair and data that it is for, and schedules."""

    published: float
    source: str
    pair: dict[str, Any]
    data: str
    binarize: str
    stages: tuple[Stage, ...]
    paper: tuple[Stage, ...]
    pythae: float | None = None
    factory: str = "ppvae.models:vae"
    bits: bool = False
    particles: int = 5000

    @property
    def family(self) -> str:
        """The pair and the data in a word, by which rows share stages."""
        sizes = "-".join(str(v["name"] if isinstance(v, dict) else v) for v in self.pair.values())
        return "".join(c for c in f"{self.data}-{self.binarize}-{sizes}" if c.isalnum() or c in "-.")


@dataclass(frozen=True)
class Settings:
    """Which rows, by which schedules, and the estimates; data, epochs and hidden are for small runs."""

    rows: tuple[str, ...] = dataclasses.field(default_factory=lambda: tuple(ROWS))
    seeds: tuple[int, ...] = (0,)
    paper: bool = False
    num_refined: int = 1000
    refined_particles: int = 3000
    coarse_particles: int = 100
    data: str | None = None
    epochs: int | None = None
    hidden: tuple[int, ...] | None = None


def vae(draws: int, **options: Any) -> Callable[[], PyroELBO]:
    return functools.partial(objectives.ELBO, draws, **options)


def bound(draws: int, **options: Any) -> Callable[[], PyroELBO]:
    return functools.partial(objectives.IWAE, draws, **options)


def by_paper(name: str, objective: Callable[[], PyroELBO], batch: int = 20) -> tuple[Stage]:
    """The schedule of Burda et al. 2016: 3280 epochs in float32."""
    decay = iwae.stepwise_decay(iwae.PAPER)
    return (Stage(f"{name}, paper", objective, len(iwae.PAPER), batch, 1e-3, None, "float32", decay),)


def by_vamp_paper(warmup: int) -> tuple[Stage]:
    """The schedule of Tomczak and Welling 2018: early stopping, and a warm-up of beta in steps."""
    constant = functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
    return (Stage("VAE-1, paper", vae(1, warmup=warmup), 2000, 100, 5e-4, 50, "float32", constant),)


DYNAMIC = ("mnist-59600", "dynamic")
ONE, TWO = {"latent": 50, "hidden": (200, 200)}, {"hidden": (200, 200)}
VAMP = {"latent": 40, "hidden": (300, 300)}
FREY = VAMP | {"likelihood": {"name": "DiscretizedLogistic"}}
PSEUDO = {"prior": {"name": "VampPrior.from_data", "components": 500}}
SPHERE = {"latent": 11, "hidden": (256, 128)}
SPHERE |= {"prior": {"name": "UniformOnSphere"}, "posterior": {"name": "PowerSpherical"}}
BURDA, TOMCZAK = "Burda et al. 2016 (arXiv 1509.00519)", "Tomczak and Welling 2018 (arXiv 1705.07120)"
RAINFORTH, DAVIDSON = "Rainforth et al. 2018 (arXiv 1802.04537)", "Davidson et al. 2018 (arXiv 1804.00891)"
TWO_LAYERS = "experiments.published:two_layers"

VAE1 = Stage("VAE-1", vae(1, gradient="stl"), 300, 100, 2e-3)
VAE5 = Stage("VAE-5", vae(5, gradient="stl"), 50, 100, 1e-3)
VAE50 = Stage("VAE-50", vae(50, gradient="stl"), 10, 50, 5e-4)
IWAE5 = Stage("IWAE-5", bound(5, gradient="dreg"), 100, 100, 1e-3)
IWAE50 = Stage("IWAE-50", bound(50, gradient="dreg"), 20, 50, 5e-4)
CIWAE = functools.partial(objectives.CIWAE, 0.05, 64)
STATIC = Stage("VAE-1", vae(1, gradient="stl"), 200, 100, 1e-3, 30)
FREY1 = Stage("VAE-1", vae(1), 600, 100, 1e-3, 150, "float32")


def burda(published: float, name: str, stages: tuple[Stage, ...], layers: int = 1) -> Row:
    """A cell of Burda's Table 1 on dynamically binarised MNIST."""
    kind, draws = name.split("-")
    paper = by_paper(name, (vae if kind == "VAE" else bound)(int(draws)))
    factory, pair = ("ppvae.models:vae", ONE) if layers == 1 else (TWO_LAYERS, TWO)
    return Row(published, BURDA, pair, *DYNAMIC, stages, paper, factory=factory)


ROWS = {
    "frey": Row(4.63, TOMCZAK, FREY, "freyfaces", "none", (FREY1,), by_vamp_paper(1600), bits=True),
    "frey-VampPrior": Row(
        4.57, TOMCZAK, FREY | PSEUDO, "freyfaces", "none", (FREY1,), by_vamp_paper(1600), bits=True
    ),
    "S-VAE": Row(
        93.16, DAVIDSON, SPHERE, *DYNAMIC, (Stage("S-VAE", vae(1, analytic_kl=True), 120, 100, 2e-3),),
        (Stage("S-VAE, paper", vae(1, analytic_kl=True), 1000, 64, 1e-3, 50, "float32"),), 93.13, particles=500,
    ),
    "1-VAE-1": burda(86.76, "VAE-1", (VAE1,)),
    "1-IWAE-5": burda(85.54, "IWAE-5", (VAE1, IWAE5)),
    "1-VAE-5": burda(86.47, "VAE-5", (VAE1, VAE5)),
    "1-IWAE-50": burda(84.78, "IWAE-50", (VAE1, IWAE5, IWAE50)),
    "1-VAE-50": burda(86.35, "VAE-50", (VAE1, VAE5, VAE50)),
    "CIWAE": Row(
        84.57, RAINFORTH, ONE, *DYNAMIC, (VAE1, IWAE5, Stage("CIWAE", functools.partial(CIWAE, gradient="dreg"), 15, 50,
        5e-4)), by_paper("CIWAE", CIWAE, 64), 84.74,
    ),
    "MIWAE": Row(
        84.97, RAINFORTH, ONE, *DYNAMIC, (VAE1, IWAE5, Stage("MIWAE", functools.partial(objectives.MIWAE, 8, 8,
        gradient="dreg"), 15, 50, 5e-4)), by_paper("MIWAE", functools.partial(objectives.MIWAE, 8, 8), 64), 85.09,
    ),
    "PIWAE": Row(
        84.46, RAINFORTH, ONE, *DYNAMIC, (VAE1, IWAE5, Stage("PIWAE", functools.partial(objectives.PIWAE, 8, 8,
        gradient="dreg"), 15, 50, 5e-4)), by_paper("PIWAE", functools.partial(objectives.PIWAE, 8, 8), 64), 84.58,
    ),
    "2-VAE-1": burda(85.33, "VAE-1", (VAE1,), 2),
    "2-IWAE-5": burda(83.89, "IWAE-5", (VAE1, IWAE5), 2),
    "2-VAE-5": burda(85.01, "VAE-5", (VAE1, VAE5), 2),
    "2-IWAE-50": burda(82.90, "IWAE-50", (VAE1, IWAE5, IWAE50), 2),
    "2-VAE-50": burda(84.78, "VAE-50", (VAE1, VAE5, VAE50), 2),
    "fixed-VAE-1": Row(88.71, BURDA, ONE, "mnist", "fixed", (STATIC,), by_paper("VAE-1", vae(1))),
    "fixed-IWAE-50": Row(
        87.10, BURDA, ONE, "mnist", "fixed", (STATIC, IWAE50._replace(patience=5)), by_paper("IWAE-50", bound(50)),
        86.82,
    ),
    "fixed-VampPrior": Row(85.57, TOMCZAK, VAMP | PSEUDO, "mnist", "fixed", (STATIC,), by_vamp_paper(50_000), 85.79),
    "omniglot-VAE-1": Row(108.11, BURDA, ONE, "omniglot", "dynamic", (VAE1,), by_paper("VAE-1", vae(1))),
    "omniglot-IWAE-50": Row(
        104.67, BURDA, ONE, "omniglot", "dynamic", (VAE1, IWAE5, IWAE50), by_paper("IWAE-50", bound(50))
    ),
}  # fmt: skip
SMOKE = {"rows": ("frey-VampPrior", "1-IWAE-5", "2-VAE-1"), "num_refined": 20, "refined_particles": 50}
SMOKE |= {"coarse_particles": 50, "data": "digits", "epochs": 1, "hidden": (8, 8)}


def two_layers(train: Tensor, hidden: tuple[int, ...] = (200, 200)) -> HierarchicalVAE:
    """The two-layer networks of Burda et al. 2016.

    Args:
        train: the training data.
        hidden: the widths of the encoder's first hidden layers.
    """
    pair = table1.build_pair(table1.Settings(hidden=hidden), 2, train.mean(0))
    assert isinstance(pair, HierarchicalVAE)
    return pair


def small(s: Settings, row: Row) -> Row:
    """The row with the schedules, and the sizes where they are given, of the settings."""
    stages = row.paper if s.paper else row.stages
    if s.epochs is not None:
        stages = tuple(stage._replace(epochs=s.epochs) for stage in stages)
    pair = row.pair | ({"hidden": s.hidden} if s.hidden else {})
    if s.hidden and "prior" in pair and "components" in pair["prior"]:
        pair |= {"prior": pair["prior"] | {"components": 5}}
    if s.data == "digits" and "likelihood" in pair:
        pair |= {"likelihood": pair["likelihood"] | {"levels": 17}}
    return row._replace(stages=stages, pair=pair, data=s.data or row.data)


def train_stage(row: Row, count: int, pair: Any, splits: Any, workspace: Workspace, seed: int) -> Run:
    """The stage of that number, in a folder that `ppvae.load` and `ppvae evaluate` read."""
    stage, (train, valid, test) = row.stages[count - 1], splits
    chain = "+".join(s.name for s in row.stages[:count]).replace(", ", "-")
    folder = workspace.folder.parent / "stages" / f"{row.family}-{chain}-{seed}"
    options: dict[str, Any] = {} if stage.decay is None else {"scheduler": stage.decay}
    return cells.train(
        pair, train, valid, dataclasses.replace(workspace, folder=folder), epochs=stage.epochs, lr=stage.lr,
        objective=stage.objective(), batch_size=stage.batch, seed=seed + count - 1, patience=stage.patience,
        optimizer=functools.partial(torch.optim.Adam, lr=stage.lr, eps=1e-4), precision=stage.precision,
        config={
            "pair": {
                "name": row.factory, "arguments": row.pair, "path": [], "num_labels": None, "columns": None,
                "train": [[list(train.shape), "float32"]],
            },
            "data": dataclasses.asdict(Data(data=row.data, binarize=row.binarize)),  # type: ignore[arg-type]
            "test": joined_digest((test,)),
        }, **options,
    )  # fmt: skip


def compute(s: Settings, workspace: Workspace, row: str, seed: int) -> dict[str, Any]:
    """Trains the stages of a row, and estimates log p(x) of the test images."""
    r = small(s, ROWS[row])
    binarize = None if r.binarize == "none" else r.binarize
    train, valid, test = data.load(r.data, workspace.root, binarize=binarize)
    splits = train, valid.head(2000), test
    torch.manual_seed(seed)
    model, guide = pairs.build(pairs.resolve(r.factory), r.pair, train)
    pair: Any = type("Pair", (), {"model": staticmethod(model), "guide": staticmethod(guide)})
    runs = [train_stage(r, i + 1, pair, splits, workspace, seed) for i in range(len(r.stages))]
    particles = 50 if s.epochs == 1 else r.particles
    found = evaluate(s, runs[-1], test, particles, seed, workspace.folder)
    curve, minutes = [], 0.0
    for epoch in (epoch for run in runs for epoch in run.history):
        minutes += epoch["cpu_seconds"] / 60
        curve.append([round(minutes, 3), round(-epoch["valid_elbo"], 4)])
    texts = "; then ".join(stage.text for stage in r.stages)
    folder = str(runs[-1].directory)
    return found | cells.training_summary(*runs) | {"schedule": texts, "curve": thinned(curve), "run": folder}


def thinned(curve: list[list[float]], count: int = 60) -> list[list[float]]:
    """About so many points of a curve, the last among them."""
    step = max(1, len(curve) // count)
    return curve[(len(curve) - 1) % step :: step]


def evaluate(s: Settings, run: Run, test: Any, particles: int, seed: int, folder: Path) -> dict[str, Any]:
    """L_K and the refined estimate on the first test images and, by the difference from L_100, on all of them."""
    first, pair, start = test.head(s.num_refined), (run.model, run.guide), time.process_time()
    est = refined_log_marginal(
        *pair,
        first,
        num_particles=s.refined_particles,
        guide_particles=particles,
        seed=seed,
        directory=folder / "first",
    )
    coarse = log_marginal(*pair, test, num_particles=s.coarse_particles, seed=seed, directory=folder / "coarse")
    of_guide, mean = est.guide_estimate or est, float(coarse.log_px.mean())
    result = coarse.attributes() | {"num_particles": of_guide.num_particles}
    for name, one in (("", of_guide), ("refined_", est)):
        more = one.log_px - coarse.log_px[: len(first)]
        rest = max(0.0, 1 - len(first) / len(test))  # of the test images, for which the difference is estimated
        error = math.sqrt(rest * float(more.var()) / len(more))
        nll = -mean - float(more.mean())
        result |= {
            f"{name}nll": nll, f"{name}error": error, f"{name}first": -float(one.log_px.mean()),
            f"{name}bits": nll / test.shape[1] / math.log(2), f"{name}reliable": float(one.reliable.double().mean()),
        }  # fmt: skip
    groups = coarse.log_px.tensor_split(min(cells.GROUPS, len(test)))
    moved = -result["nll"] - mean
    return result | {
        "refined": est.guide_estimate is not None, "num_first": len(first),
        "groups": [round(float(g.mean()) + moved, 5) for g in groups],
        "evaluation_cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def behind(cell: dict[str, Any]) -> float:
    """By how much a cell's NLL is above the published figure, in nats (bits per dimension for Frey faces)."""
    row, result = ROWS[cell["cell"]["row"]], cell["result"]
    return float(result["bits"] if row.bits else result["nll"]) - row.published


def is_reached(cell: dict[str, Any]) -> bool:
    row, dims = ROWS[cell["cell"]["row"]], cell["result"]["dims"]
    return behind(cell) <= (REACHED / dims / math.log(2) if row.bits else REACHED)


def table(found: Cells) -> str:
    """A row for each published figure, sorted by the difference."""
    header = (
        "row", "seed", "published", "Pythae", "ours, L_K", "ours, refined", "difference", "reached", "reliable",
        "L_K, first", "refined, first", "CPU minutes",
    )  # fmt: skip
    lines, details = [], []
    for c in sorted(found, key=behind):
        name, r = c["cell"]["row"], c["result"]
        row, small_run = ROWS[name], c["settings"]["data"] is not None
        key, digits = ("bits", 3) if row.bits else ("nll", 2)
        scale = 1 / (r["dims"] * math.log(2)) if row.bits else 1.0
        refined = f"{r[f'refined_{key}']:.{digits}f} ± {scale * r['refined_error']:.{digits}f}" if r["refined"] else ""
        ours = f"{r[key]:.{digits}f} ± {scale * r['error']:.{digits}f} (K = {r['num_particles']})"
        lines.append((
            name, c["cell"]["seed"], f"{row.published:.2f}{' bits per dim' * row.bits}", row.pythae or "", ours,
            refined,
            "" if small_run else f"{behind(c):+.{digits}f}", "" if small_run else "yes" if is_reached(c) else "no",
            f"{100 * r['refined_reliable']:.0f} %", f"{r['first']:.3f}", f"{r['refined_first']:.3f}",
            f"{r['training_cpu_seconds'] / 60:.1f} + {r['evaluation_cpu_seconds'] / 60:.1f}",
        ))  # fmt: skip
        details.append(f"- {name} ({row.source}): {r['schedule']}.")
    says = (
        "NLL in nats, or bits per dimension. ± is the error of the difference estimator, not that over test images, "
        "which the published figures have, too. CPU minutes are of training and evaluation. \"First\" are the first "
        f"{max(c['result']['num_first'] for c in found)} test images, whose numbers `ppvae evaluate --head` prints; "
        "\"reliable\" is their share for which the refined estimate is."
    )  # fmt: skip
    return f"{says}\n\n{cells.markdown(header, lines)}\n\n" + "\n".join(details)


@styled
def draw_row(cell: dict[str, Any], images: Tensor, event: tuple[int, ...]) -> Any:
    """Means of p(x | z) for z of the prior, and the validation ELBO against CPU minutes beside the published figure."""
    row, dims = ROWS[cell["cell"]["row"]], cell["result"]["dims"]
    fig = figure(8.5, 3.4)
    left, right = fig.subplots(1, 2)
    image_grid(images, event, rows=6, cols=8, ax=left)
    scale = dims * math.log(2) if row.bits else 1.0
    minutes, elbo = zip(*cell["result"]["curve"], strict=True)
    right.plot(minutes, [e / scale for e in elbo], color=BLUE, label="validation, minus the ELBO")
    ours = cell["result"]["bits" if row.bits else "nll"]
    right.axhline(ours, color=BLUE, linestyle=":", label=f"test, L_{cell['result']['num_particles']}")
    right.axhline(row.published, color=VERMILLION, linestyle="--", label="published")
    right.set_xlabel("CPU minutes")
    right.set_ylabel("bits per dim" if row.bits else "nats")
    low = min(row.published, ours)
    right.set_ylim(low - 0.02 * low, min(max(elbo) / scale, 1.25 * low))
    right.legend()
    return fig


def draw(found: Cells, folder: Path) -> None:
    """A picture of each row whose run is still there."""
    for c in found:
        if not Path(c["result"]["run"], "config.json").exists():
            continue
        run = load(c["result"]["run"])
        r = ROWS[c["cell"]["row"]]
        test = data.load(run.config["data"]["data"], binarize=None if r.binarize == "none" else "fixed")[2].head(8)
        images = generate.samples(run.model, run.guide, test, 48)
        draw_row(c, images, tuple(test.event_shape)).savefig(folder / f"{c['cell']['row']}-{c['cell']['seed']}.png")


def rows_of(args: list[str]) -> list[str]:
    """The flags with `--only ROW ...` as `--rows ROW ...`, and `--again ROW ...` as `--again --rows ROW ...`."""
    out: list[str] = []
    for flag, following in zip(args, [*args[1:], "--"], strict=True):
        named = not following.startswith("--")
        out += ["--rows"] if flag == "--only" else [flag, "--rows"] if flag == "--again" and named else [flag]
    return out


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    flags = rows_of(sys.argv[1:] if args is None else args)
    found, folder = cells.run("published", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, flags)
    draw(found, folder)


if __name__ == "__main__":
    main()
