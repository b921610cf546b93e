"""log p(x) of MNIST by three estimates, and what each costs: importance sampling from the guide (K = 5000, the number
that papers print), importance sampling from a density refined to each image, and annealing.

The networks of `table1` (Burda et al. 2016, arXiv 1509.00519), one and two stochastic layers, trained for 25 epochs on
the ELBO (VAE-1) or the bound of five draws (IWAE-5). The guide and the refined proposal estimate log p(x) of the first
1000 test images, annealing that of the first 100. All three are lower bounds on average: the highest is the closest.
Seconds are CPU seconds of one thread per image, compilation of what is evaluated included; the difference from
annealing is paired over the images that both have."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor

from experiments import cells, iwae, table1
from experiments.cells import Cells, Workspace
from ppvae import data, log_marginal
from ppvae.evaluation import Estimate, annealed, load_estimate
from ppvae.evaluation.results import mean_and_error
from ppvae.plots.style import BLUE, FAINT, GREEN, INK, VERMILLION, decimal_log_ticks, figure, styled
from ppvae.storage import write_json


@dataclass(frozen=True)
class Settings:
    """The pairs, their training, and the three estimates."""

    layers: tuple[int, ...] = (1, 2)
    rows: tuple[str, ...] = ("VAE-1", "IWAE-5")
    seeds: tuple[int, ...] = (0,)
    data: str = "mnist"
    hidden: tuple[int, ...] = (200, 200)
    epochs: int = 25
    batch_size: int = 100
    lr: float = 1e-3
    num_test: int = 1000
    num_annealed: int = 100
    particles: int = 5000  # of the guide
    refined_particles: int = 3000
    chains: int = 8
    temperatures: int = 500


SMOKE = {"data": "digits", "hidden": (8, 8), "epochs": 2, "num_test": 20, "num_annealed": 5, "particles": 50}
SMOKE |= {"refined_particles": 50, "chains": 2, "temperatures": 5}
METHODS = ("guide", "refined", "annealed")


def compute(s: Settings, workspace: Workspace, layer: int, row: str, seed: int) -> dict[str, Any]:
    """Trains one pair, and estimates log p(x) of the test images by each method."""
    images, valid, test = data.load(s.data, workspace.root, binarize="dynamic")
    torch.manual_seed(seed)
    vae = table1.build_pair(table1.Settings(hidden=s.hidden), layer, images.as_subclass(torch.Tensor).mean(0))
    name, draws = row.split("-")
    objective = iwae.OBJECTIVES[name](int(draws))
    run = cells.train(
        vae, images, valid.head(2000), workspace, epochs=s.epochs, lr=s.lr, batch_size=s.batch_size,
        objective=objective, seed=seed,
    )  # fmt: skip
    pair, how, blocks = (run.model, run.guide), {"seed": seed}, workspace.folder / "blocks"
    methods: dict[str, Callable[[], Estimate]] = {
        "annealed": lambda: annealed(
            *pair, test.head(s.num_annealed), num_chains=s.chains, num_temperatures=s.temperatures,
            directory=blocks / "annealed", **how,
        ),
        "guide": lambda: log_marginal(*pair, test.head(s.num_test), num_particles=s.particles, proposal="guide", **how),
        "refined": lambda: log_marginal(
            *pair, test.head(s.num_test), num_particles=s.refined_particles, proposal="refined", **how
        ),
    }  # fmt: skip
    found = {name: measure(workspace.folder, name, method) for name, method in methods.items()}
    est, best = found["refined"][0], found["annealed"][0]
    result = cells.training_summary(run) | cells.estimate_summary(est)
    for name, (one, seconds, wall) in found.items():
        first = one.log_px[: s.num_annealed]
        below, error = mean_and_error(best.log_px - first)
        result |= {
            f"{name}_log_px": float(one.log_px.mean()), f"{name}_first": float(first.mean()),
            f"{name}_reliable": float(one.reliable.double().mean()), f"{name}_seconds": seconds / len(one.log_px),
            f"{name}_wall": wall / len(one.log_px), f"{name}_below": below, f"{name}_below_error": error,
            f"{name}_std_error": float(one.std_error[: s.num_annealed].median()),
        }  # fmt: skip
    curve = {k: best.log_px - bound[: s.num_annealed] for k, bound in sorted(found["guide"][0].bounds.items())}
    result |= {"curve": {str(k): float(below.mean()) for k, below in curve.items()}}
    return result | {"annealed_mean_std_error": float(best.std_error.square().sum().sqrt()) / len(best.log_px)}


def cpu_seconds() -> float:
    """Of this process and its children, among them the compiler."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextmanager
def cold_compiler() -> Iterator[None]:
    """No kernels of earlier runs, and none compiled in a process whose time would not count."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder, inductor.patch(compile_threads=1, force_disable_caches=True):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            torch.compile(torch.exp)(torch.ones(8))  # the first use checks the compiler, which belongs to no method
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def measure(folder: Path, name: str, method: Callable[[], Estimate]) -> tuple[Estimate, float, float]:
    """(estimate, CPU seconds, seconds): computed, or read where the folder holds them.

    An estimate that was interrupted and resumed has the seconds of its last part only.
    """
    clock = folder / f"{name}_seconds.json"
    if clock.exists():
        seconds = json.loads(clock.read_text())
    else:
        with cold_compiler():
            cpu, wall = cpu_seconds(), time.perf_counter()
            method().save(folder, name)
            seconds = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
        write_json(clock, seconds)
    return load_estimate(folder / f"{name}.json"), seconds["cpu"], seconds["wall"]


def cost_at_equal_error(r: dict[str, float]) -> float:
    """Seconds of annealing in those of refined, with as many chains as give it the standard error of refined."""
    return r["annealed_seconds"] / r["refined_seconds"] * (r["annealed_std_error"] / r["refined_std_error"]) ** 2


def table(found: Cells) -> str:
    """A row for each pair and method: log p(x), share of reliable data, cost, and distance from annealing."""
    header = (
        "pair", "log p(x) by", "mean, all images", "mean, annealed images", "below annealing", "reliable",
        "std. error per image", "CPU ms per image", "times the guide",
    )  # fmt: skip
    lines = []
    for (layer, row), r in cells.group_cells(found, "layer", "row").items():
        s = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in r[0]["settings"].items()})
        words = {
            "guide": f"the guide, K = {s.particles}", "refined": f"refined, K = {s.refined_particles}",
            "annealed": f"annealing, {s.chains} x {s.temperatures}",
        }  # fmt: skip
        for name in METHODS:
            whole = "" if name == "annealed" else f"{cells.mean(r, f'{name}_log_px'):.3f}"
            below = f"{cells.mean(r, f'{name}_below'):+.3f} ± {cells.mean(r, f'{name}_below_error'):.3f}"
            lines.append((
                f"{('one', 'two')[layer - 1]} layer{'s' * (layer > 1)}, {row}" if name == "guide" else "",
                words[name], whole, f"{cells.mean(r, f'{name}_first'):.3f}", "" if name == "annealed" else below,
                f"{100 * cells.mean(r, f'{name}_reliable'):.1f} %", f"{cells.mean(r, f'{name}_std_error'):.3f}",
                f"{1000 * cells.mean(r, f'{name}_seconds'):.0f}",
                f"{cells.mean(r, f'{name}_seconds') / cells.mean(r, 'guide_seconds'):.2f}",
            ))  # fmt: skip
    first, says = found[0]["result"], []
    for layer in sorted({c["cell"]["layer"] for c in found}):
        own = [c["result"] for c in found if c["cell"]["layer"] == layer]
        ratio = statistics.median(one["refined_seconds"] / one["guide_seconds"] for one in own)
        times = statistics.median(one["annealed_seconds"] / one["refined_seconds"] for one in own)
        equal = statistics.median(cost_at_equal_error(one) for one in own)
        says.append(
            f"{('One layer', 'Two layers')[layer - 1]}: refined takes {ratio:.2f} times the CPU seconds of the guide "
            f"(median over pairs), and annealing {times:.0f} times those of refined; with as many chains as give it "
            f"the standard error per image of refined, {equal:.0f} times."
        )
    count = first["num_data"]
    return f"{' '.join(says)} Means over all {count} images or those annealed.\n\n{cells.markdown(header, lines)}"


@styled
def draw_figure(found: Cells) -> Any:
    """Error of log p(x), as its distance below annealing, against the CPU seconds of an image."""
    layers = sorted({c["cell"]["layer"] for c in found})
    fig = figure(4.6 * len(layers) + 1.6, 3.6)
    axes = fig.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    for ax, layer in zip(axes, layers, strict=True):
        for c in (c for c in found if c["cell"]["layer"] == layer):
            r, row = c["result"], c["cell"]["row"]
            line, filled = ("-", "full") if row.startswith("VAE") else ("--", "none")
            ks = [int(k) for k in r["curve"] if int(k) >= 50]
            per_draw = r["guide_seconds"] / max(ks)
            label = f"guide, K = {min(ks)} to {max(ks)} ({row})"
            ax.plot([k * per_draw for k in ks], [r["curve"][str(k)] for k in ks], line, color=VERMILLION, label=label)
            for name, color, marker in (("guide", VERMILLION, "o"), ("refined", BLUE, "s"), ("annealed", GREEN, "D")):
                error = 2 * (r["annealed_mean_std_error"] if name == "annealed" else r[f"{name}_below_error"])
                words = None if name == "guide" else f"{name} ({row})"
                ax.errorbar(
                    r[f"{name}_seconds"], r[f"{name}_below"], error, color=color, marker=marker, fillstyle=filled,
                    label=words, linestyle="none", capsize=2, markersize=6,
                )  # fmt: skip
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.axhspan(-0.03, 0.03, color=FAINT, alpha=0.15, linewidth=0)
        ax.set_xscale("log")
        ax.set_yscale("symlog", linthresh=0.1, linscale=1.0)
        ax.set_xlabel("CPU seconds per image")
        ax.set_title(("one layer", "two layers")[layer - 1])
        decimal_log_ticks(ax.xaxis)
    ticks = (-0.1, -0.03, 0, 0.03, 0.1, 0.3, 1, 3)
    axes[0].set_yticks(ticks, [f"{t:g}".replace("-", "−") for t in ticks])
    for ax in axes:
        ax.minorticks_off()
    axes[0].set_ylabel("nats below annealing (± 2 std. errors)")
    handles = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[1]))
    axes[-1].legend(*handles, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    return fig


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    found, folder = cells.run("trust", Settings, ("layer", "row", "seed"), compute, table, SMOKE, __doc__, args)
    draw_figure(found).savefig(folder / "trust.png")


if __name__ == "__main__":
    main()
