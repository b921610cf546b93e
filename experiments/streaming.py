"""CPU time and memory of training and of log p(x) on data that stay on disk, by the number of data, with a picture.

A linear-Gaussian pair with 20 dims, whose log p(x) is known; the data are a .npy file that is mapped into memory. Each
number of data has a process of its own, which takes one epoch of eager steps in batches of 1000, and estimates log p(x)
of every datum with 10 particles. Memory is the largest growth of the process's own pages over the run; pages of the
file are the system's, which takes them back when it needs to. The rows and the picture are stored in results/streaming.

    python -m experiments.streaming
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench import processor
from experiments.cells import RESULTS, markdown
from ppvae import data, fit, log_marginal, plots
from ppvae.models import LinearGaussian
from ppvae.plots.style import BLUE, VERMILLION, figure, styled

DIMS, LATENT, PARTICLES = 20, 2, 10
NUMBERS = (1_000, 10_000, 100_000, 1_000_000)
CHUNK = 100_000  # rows that are written at once
HEADER = ("N", "file, MB", "epoch: CPU s", "MB more", "log p(x): CPU s", "MB more", "mean error, nats")


class PeakMemory:
    """The largest number of megabytes of a process's own pages in the block over that at its start, by a thread."""

    def __enter__(self) -> PeakMemory:
        self._start, self.peak, self._stop = _own_megabytes(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, _own_megabytes() - self._start)


def _own_megabytes() -> float:
    """The resident pages that no file holds; needs Linux."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def write(path: Path, pair: LinearGaussian, num_data: int) -> None:
    """Writes data of the pair's own model in chunks."""
    file = np.lib.format.open_memmap(path, "w+", np.float32, (num_data, DIMS))
    for start in range(0, num_data, CHUNK):
        rows = file[start : start + CHUNK]
        z = torch.randn(len(rows), LATENT)
        with torch.no_grad():
            rows[:] = (z @ torch.randn(LATENT, DIMS) + torch.randn(len(rows), DIMS)).numpy()
    file.flush()


def measure(num_data: int) -> dict[str, float]:
    """Seconds, megabytes and the mean error of log p(x) for one number of data."""
    torch.manual_seed(0)
    pair = LinearGaussian(DIMS, LATENT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        write(path, pair, num_data)
        x = np.load(path, mmap_mode="r")
        few = torch.from_numpy(x[:200].copy())  # what is set up once is no part of the measurement
        fit(pair.model, pair.mean_field, few, epochs=1, progress=False)
        log_marginal(pair.model, pair.mean_field, few, num_particles=PARTICLES, proposal="guide", progress=False)
        found: dict[str, float] = {"num_data": num_data, "file": path.stat().st_size / 1e6}
        start = time.process_time()
        with PeakMemory() as memory:
            run = fit(pair.model, pair.mean_field, x, epochs=1, batch_size=1000, compile=False, progress=False)
        found["fit_seconds"], found["fit_megabytes"] = time.process_time() - start, memory.peak
        start = time.process_time()
        with PeakMemory() as memory:
            est = log_marginal(run.model, run.guide, x, num_particles=PARTICLES, proposal="guide", progress=False)
        found["seconds"], found["megabytes"] = time.process_time() - start, memory.peak
        with torch.no_grad():
            exact = torch.cat([pair.log_px(torch.from_numpy(x[i : i + CHUNK].copy())) for i in range(0, len(x), CHUNK)])
        found["error"] = float((est.log_px - exact).mean().abs())
        held, stored = (data.load(path, lazy=lazy)[2] for lazy in (False, True))
        if held.digest != stored.digest:
            raise RuntimeError("expected the digest of data in memory")
    return found


def table(rows: list[dict[str, float]]) -> str:
    """The rows as markdown."""
    cells = [
        (
            f"{int(r['num_data']):,}", f"{r['file']:.1f}", f"{r['fit_seconds']:.2f}", f"{r['fit_megabytes']:.0f}",
            f"{r['seconds']:.2f}", f"{r['megabytes']:.0f}", f"{r['error']:.4f}",
        )
        for r in rows
    ]  # fmt: skip
    return markdown(HEADER, cells)


@styled
def picture(rows: list[dict[str, float]]) -> Any:
    """Seconds, and megabytes with the size of the file, by the number of data; both axes are logarithmic."""
    fig = figure(7.0, 3.1)
    left, right = fig.subplots(1, 2)
    n = [r["num_data"] for r in rows]
    for ax, keys in ((left, ("fit_seconds", "seconds")), (right, ("fit_megabytes", "megabytes"))):
        for key, name, colour in zip(keys, ("one epoch", "log p(x), K = 10"), (VERMILLION, BLUE), strict=True):
            ax.plot(n, [max(r[key], 0.01) for r in rows], color=colour, marker="o", markersize=4, label=name)
        ax.set(xscale="log", yscale="log", xlabel="number of data, 20 dims")
    right.plot(n, [r["file"] for r in rows], color="#999999", linestyle=":", linewidth=1, label="the file")
    left.set_ylabel("CPU seconds")
    right.set_ylabel("memory, MB")
    left.legend()
    right.legend()
    return fig


def main(args: list[str] | None = None) -> None:
    """Prints the table, and stores it with the picture unless it is that of `--smoke`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two small rows")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(args)
    if given.row:
        print(json.dumps(measure(given.row)))
        return
    rows = []
    for n in (500, 1000) if given.smoke else NUMBERS:
        command = [sys.executable, "-m", "experiments.streaming", "--row", str(n)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
        print(table(rows).splitlines()[-1], flush=True)
    print(f"{processor()}, {torch.get_num_threads()} threads\n{table(rows)}")
    figure_of_rows = plots.to_png(picture(rows))
    if not given.smoke:
        (RESULTS / "streaming").mkdir(parents=True, exist_ok=True)
        content = {"machine": processor(), "threads": torch.get_num_threads(), "rows": rows}
        (RESULTS / "streaming" / "rows.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / "streaming" / "streaming.png").write_bytes(figure_of_rows)


if __name__ == "__main__":
    main()
