"""Published results, row by row, beside ours and beside those of Pythae, another library's reproduction of them.

Rows are in the order of nats gained per hour. Every row is one run folder, or a chain of them: a stage continues from
the parameters of the one before it, and rows that begin alike share it, as in Table 2 of Burda et al. 2016 (arXiv
1509.00519). Our schedules are shorter than the papers': larger batches, doubly reparameterised gradients (Tucker et al.
2019, arXiv 1810.04152), cosine decay of the learning rate, matrix products in bfloat16; `--paper` takes the papers'
schedules. Dynamically binarised MNIST has 59,600 training images, as in the code of Burda et al.; parameters are those
of the last epoch, or of the best validation ELBO where a schedule says so. Fixed binarisation is that of Larochelle
(`binarized-mnist`) where its files are there, else ours at seed 0 (`mnist`); images of OMNIGLOT have the sizes of the
published split, but are not its file, and the split of Frey faces is ours, too. `--only ROW` computes a row, and
`--again ROW` repeats a stored one. Trained parameters are kept in `results/published/weights`, and
`experiments.release` makes run folders of them: a row continues a kept stage instead of training it; `--again` trains
all of them.

L_K of the guide, which papers print, and the refined estimate of log p(x) come from one call on the first
`--num-refined` test images. L_100 of all test images carries both over to the whole set: mean of L_100 over all, plus
the mean difference over the first (a difference estimator, whose standard error is given)."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import cells, table1, weights
from experiments.cells import Cells, Workspace
from experiments.published_rows import ROWS, Row
from ppvae import data, generate, load, log_marginal
from ppvae.cli.common import joined_digest
from ppvae.cli.options import Data
from ppvae.evaluation import refined_log_marginal
from ppvae.factories import pairs
from ppvae.plots import image_grid
from ppvae.plots.style import BLUE, VERMILLION, figure, styled
from ppvae.training import checkpoint
from ppvae.training.run import Run

REACHED = 0.3  # nats


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


SMOKE = {"rows": ("frey-VampPrior", "1-IWAE-5", "2-VAE-1"), "num_refined": 20, "refined_particles": 50}
SMOKE |= {"coarse_particles": 50, "data": "digits", "epochs": 1, "hidden": (8, 8)}


def small(s: Settings, row: Row) -> Row:
    """The row with the schedules, and the sizes where they are given, of the settings."""
    stages = row.paper if s.paper else row.stages
    if s.epochs is not None:
        stages = tuple(stage._replace(name=f"{stage.name}-{s.epochs}", epochs=s.epochs) for stage in stages)
    pair = row.pair | ({"hidden": s.hidden} if s.hidden else {})
    if s.hidden and "prior" in pair and "components" in pair["prior"]:
        pair |= {"prior": pair["prior"] | {"components": 5}}
    if s.data == "digits" and "likelihood" in pair:
        pair |= {"likelihood": pair["likelihood"] | {"levels": 17}}
    particles = s.refined_particles if s.data else row.particles
    return row._replace(stages=stages, pair=pair, data=s.data or row.data, particles=particles)


def larochelle(row: Row, root: Path | None) -> Row:
    """The row on Larochelle's fixed binarisation of MNIST, if it is one of ours and his files are under the root."""
    there = (data.root_folder(root) / "BinarizedMNIST").is_dir()
    return row._replace(data="binarized-mnist") if there and (row.data, row.binarize) == ("mnist", "fixed") else row


def stage_name(row: Row, count: int, seed: int) -> str:
    """The name of the folder of the stage of that number, counted from 1: the family of rows that share it, the stages
    up to it, and the seed."""
    chain = "+".join(s.name for s in row.stages[:count]).replace(", ", "-")
    return f"{row.family}-{chain}-{seed}"


def train_stage(row: Row, count: int, pair: Any, splits: Any, workspace: Workspace, seed: int) -> Run:
    """The stage of that number, in a folder that `ppvae.load` and `ppvae evaluate` read; where its weights are kept
    beside the results, nothing is trained."""
    stage, (train, valid, test) = row.stages[count - 1], splits
    folder = workspace.folder.parent / "stages" / stage_name(row, count, seed)
    weights.take(folder, workspace.results / "weights")
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
    r = larochelle(small(s, ROWS[row]), workspace.root)
    binarize = None if r.binarize == "none" else r.binarize
    train, valid, test = data.load(r.data, workspace.root, binarize=binarize)
    splits = train, valid.head(2000), test
    torch.manual_seed(seed)
    model, guide = pairs.build(pairs.resolve(r.factory), r.pair, train)
    pair: Any = type("Pair", (), {"model": staticmethod(model), "guide": staticmethod(guide)})
    runs = [train_stage(r, i + 1, pair, splits, workspace, seed) for i in range(len(r.stages))]
    found = evaluate(s, runs[-1], test, r.particles, seed, workspace.folder)
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
    coarse = log_marginal(
        *pair, test, num_particles=s.coarse_particles, seed=seed, directory=folder / "coarse", proposal="guide"
    )
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


def data_of(cell: dict[str, Any]) -> str:
    """The name of the data set of a cell."""
    return str(cell["result"]["data"].split("/")[0])


def behind(cell: dict[str, Any]) -> float:
    """By how much a cell's NLL is above the published figure, in nats (bits per dimension for Frey faces)."""
    row, result = ROWS[cell["cell"]["row"]], cell["result"]
    return float(result["bits"] if row.bits else result["nll"]) - row.published


def is_reached(cell: dict[str, Any]) -> bool:
    row, dims = ROWS[cell["cell"]["row"]], cell["result"]["dims"]
    return behind(cell) <= (REACHED / dims / math.log(2) if row.bits else REACHED)


def line(cell: dict[str, Any]) -> tuple[Any, ...]:
    """The values of `LINE` for a cell."""
    name, r = cell["cell"]["row"], cell["result"]
    row, small_run = ROWS[name], cell["settings"]["data"] not in (None, "mnist")
    reached = ("yes" if is_reached(cell) else "no") + f", {row.other}" * bool(row.other)
    key, digits = ("bits", 3) if row.bits else ("nll", 2)
    scale = 1 / (r["dims"] * math.log(2)) if row.bits else 1.0

    def number(prefix: str) -> str:
        error = f" ± {scale * r[f'{prefix}error']:.{digits}f}" if r.get(f"{prefix}error") else ""
        return f"{r[f'{prefix}{key}']:.{digits}f}{error}"

    return (
        name, data_of(cell), cell["cell"]["seed"], f"{row.published:.2f}{' bits per dim' * row.bits}", row.pythae or "",
        f"{number('')} (K = {r['num_particles']})", f"± {scale * r['nll_std_error']:.{digits}f}",
        number("refined_") if r.get("refined") else "",
        "" if small_run else f"{behind(cell):+.{digits}f}", "" if small_run else reached,
    )  # fmt: skip


LINE = (
    "row", "data", "seed", "published", "Pythae", "ours, L_K", "over images", "ours, refined", "difference", "reached",
)  # fmt: skip


def table(found: Cells) -> str:
    """A row for each published figure, sorted by the difference."""
    header = (*LINE, "reliable", "L_K, first", "refined, first", "CPU minutes")
    found = sorted(found, key=behind)
    lines = [
        (
            *line(c), f"{100 * c['result']['refined_reliable']:.0f} %", f"{c['result']['first']:.3f}",
            f"{c['result']['refined_first']:.3f}",
            f"{c['result']['training_cpu_seconds'] / 60:.1f} + {c['result']['evaluation_cpu_seconds'] / 60:.1f}",
        )
        for c in found
    ]  # fmt: skip
    details = [f"- {c['cell']['row']} ({ROWS[c['cell']['row']].source}): {c['result']['schedule']}." for c in found]
    says = (
        "NLL in nats, or bits per dimension. ± of ours is the error of the difference estimator, \"over images\" the "
        "standard error over test images, which published figures have, too. \"First\" are the first "
        f"{max(c['result']['num_first'] for c in found)} test images, whose numbers `ppvae evaluate --head` prints; "
        "\"reliable\" is their share for which the refined estimate is. CPU minutes are of training and evaluation."
    )  # fmt: skip
    return f"{says}\n\n{cells.markdown(header, lines)}\n\n" + "\n".join(details)


def page() -> str:
    """The table of the documentation: these rows, those that only `table1` has, and a picture of each."""
    found = cells.load_cells(cells.RESULTS / "published", Settings())
    have = {c["cell"]["row"] for c in found}
    for c in cells.load_cells(cells.RESULTS / "table1", table1.Settings()):
        name = f"{c['cell']['layer']}-{c['cell']['row']}"
        if name not in have and c["settings"]["data"] == "mnist":
            found.append(c | {"cell": {"row": name, "seed": c["cell"]["seed"]}})
    found = sorted(found, key=behind)
    lines = [
        (*line(c), f"{c['result']['training_cpu_seconds'] / 60:.0f}", c["result"].get("schedule", "as in `table1`"))
        for c in found
    ]
    missing = ", ".join(name for name in ROWS if name not in {c["cell"]["row"] for c in found})
    alike = [c for c in found if not ROWS[c["cell"]["row"]].other]
    others = [c for c in found if c not in alike]
    pictures = [
        f"## {name}\n\n![{name}: samples, and the learning curve](pictures/published/{name}-{c['cell']['seed']}.png)"
        for c in found
        if (cells.RESULTS / "published" / f"{(name := c['cell']['row'])}-{c['cell']['seed']}.png").exists()
    ]
    says = f"{sum(map(is_reached, alike))} of {len(alike)} rows are reached"
    says += f", and {sum(map(is_reached, others))} of {len(others)} on other images." if others else "."
    says += f" Not computed yet: {missing}." if missing else ""
    return "\n\n".join([says, cells.markdown((*LINE, "CPU minutes", "schedule"), lines), *pictures]) + "\n"


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


def keep_weights(found: Cells, folder: Path) -> None:
    """Keeps, beside the results, the stages of each row whose run is still there and is that of its cell."""
    for c in found:
        last = Path(c["result"]["run"])
        if not checkpoint.exists(last / "checkpoints"):
            continue
        of_run = checkpoint.read(last / "checkpoints")
        if not of_run["finished"] or of_run["history"][-1]["valid_elbo"] != c["result"]["valid_elbo"]:
            continue  # trained again for another row
        row = small(Settings(**c["settings"]), ROWS[c["cell"]["row"]])._replace(data=data_of(c))
        for count in range(1, len(row.stages) + 1):
            stage = last.with_name(stage_name(row, count, c["cell"]["seed"]))
            if checkpoint.exists(stage / "checkpoints"):
                weights.keep(stage, folder / "weights")


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
    keep_weights(found, folder)


if __name__ == "__main__":
    main()
