"""Time and memory of log p(x) and of an epoch of training as the number of data grows: bounded, and linear.

Each row is a process of its own: a linear-Gaussian pair with 20 dims, whose log p(x) is known, so that estimates are
checked as well. Memory is the growth of the peak resident size over that of the process with libraries and data loaded.

    python -m experiments.load
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from ppvae import fit, log_marginal
from ppvae.models import LinearGaussian

DIMS, LATENT = 20, 2
ROWS = ((20_000, 1000), (200_000, 1000), (10_000, 10), (100_000, 10), (1_000_000, 10))  # (N, K)


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
    log_marginal(pair.model, pair.mean_field, x[:100], num_particles=200, compile=False)
    found: dict[str, float] = {}
    before, start = peak(), time.perf_counter()
    run = fit(pair.model, pair.mean_field, x, epochs=1, batch_size=1000, compile=False)
    found["fit_seconds"], found["fit_mib"] = time.perf_counter() - start, peak() - before
    before, start = peak(), time.perf_counter()
    est = log_marginal(run.model, run.guide, x, num_particles=num_particles)
    found["seconds"], found["mib"] = time.perf_counter() - start, peak() - before
    with torch.no_grad():
        found["error"] = float((est.log_px - pair.log_px(x)).mean().abs())
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two small rows")
    parser.add_argument("--row", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(*args.row)))
        return
    print(
        "| N | K | epoch: s | MiB more | log p(x): s | s per 10^6 N K | MiB more | bytes a datum | mean error, nats |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for n, k in ((500, 10), (1000, 10)) if args.smoke else ROWS:
        command = [sys.executable, "-m", "experiments.load", "--row", str(n), str(k)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        m = json.loads(out.splitlines()[-1])
        cells = (
            n, k, f"{m['fit_seconds']:.1f}", f"{m['fit_mib']:.0f}", f"{m['seconds']:.1f}",
            f"{1e6 * m['seconds'] / (n * k):.2f}", f"{m['mib']:.0f}", f"{m['mib'] * 2**20 / n:.0f}",
            f"{m['error']:.4f}",
        )  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
