"""CPU time and memory of log p(x) and of an epoch of training as the number of data grows: linear, and bounded.

Each row is a process of its own: a linear-Gaussian pair with 20 dims, whose log p(x) is known, so that estimates are
checked as well. Memory is the growth of the peak resident size over that of the process with libraries and data loaded.
The rows are stored in results/load/rows.json.

    python -m experiments.load
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from experiments.cells import RESULTS, markdown
from ppvae import fit, log_marginal
from ppvae.models import LinearGaussian

DIMS, LATENT = 20, 2
ROWS = ((10_000, 10), (100_000, 10), (1_000_000, 10), (20_000, 1000), (200_000, 1000))  # (N, K)


def peak() -> float:
    """The peak resident size of this process in MiB."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return kib / 1024 / (1024 if sys.platform == "darwin" else 1)


def measure(num_data: int, num_particles: int) -> dict[str, float]:
    """Seconds and MiB of one epoch and of one estimate, and the largest error of log p(x) in standard errors."""
    torch.manual_seed(0)
    pair = LinearGaussian(DIMS, LATENT)
    x = torch.randn(num_data, LATENT) @ torch.randn(LATENT, DIMS) + torch.randn(num_data, DIMS)
    fit(pair.model, pair.mean_field, x[:200], epochs=1)
    log_marginal(pair.model, pair.mean_field, x[:100], num_particles=200, compile=False, proposal="guide")
    found: dict[str, float] = {}
    before, start = peak(), time.process_time()
    run = fit(pair.model, pair.mean_field, x, epochs=1, batch_size=1000, compile=False)
    found["fit_seconds"], found["fit_mib"] = time.process_time() - start, peak() - before
    before, start = peak(), time.process_time()
    est = log_marginal(run.model, run.guide, x, num_particles=num_particles, proposal="guide")
    found["seconds"], found["mib"] = time.process_time() - start, peak() - before
    with torch.no_grad():
        found["error"] = float((est.log_px - pair.log_px(x)).mean().abs())
    return found


HEADER = (
    "N", "K", "epoch: CPU s", "MiB more", "log p(x): CPU s", "CPU s per 10^6 N K", "MiB more", "bytes a datum",
    "mean error, nats",
)  # fmt: skip


def cells_of(row: dict[str, float]) -> tuple[str, ...]:
    """The cells of a row of the table."""
    n, k = int(row["num_data"]), int(row["num_particles"])
    return (
        f"{n:,}", f"{k:,}", f"{row['fit_seconds']:.1f}", f"{row['fit_mib']:.0f}", f"{row['seconds']:.1f}",
        f"{1e6 * row['seconds'] / (n * k):.2f}", f"{row['mib']:.0f}", f"{row['mib'] * 2**20 / n:.0f}",
        f"{row['error']:.4f}",
    )  # fmt: skip


def main() -> None:
    """Prints the table, and stores its rows unless they are those of `--smoke`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two small rows")
    parser.add_argument("--row", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(*args.row)))
        return
    rows = []
    for n, k in ((500, 10), (1000, 10)) if args.smoke else ROWS:
        command = [sys.executable, "-m", "experiments.load", "--row", str(n), str(k)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append({"num_data": n, "num_particles": k, **json.loads(out.splitlines()[-1])})
        print(markdown(HEADER, map(cells_of, rows)).splitlines()[-1], flush=True)
    print(markdown(HEADER, map(cells_of, rows)))
    if not args.smoke:
        (RESULTS / "load").mkdir(parents=True, exist_ok=True)
        (RESULTS / "load" / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
