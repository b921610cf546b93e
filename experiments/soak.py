"""Hours of training and evaluation that are killed at random: every run resumes, and ends as one that was left alone.

A cycle trains a pair in one process without interruption, and again in processes that SIGKILL ends at random moments,
resumed until they finish; then both are evaluated, the second one again under kills. Parameters must be equal
to the last bit, log p(x) up to rounding of compiled log-weights, and the folder must load in the end.

The counts are stored in results/soak/counts.json.

    python -m experiments.soak --minutes 120
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from experiments.cells import RESULTS
from ppvae import load
from ppvae.evaluation import load_estimate
from ppvae.training import checkpoint

TOLERANCE = 1e-4  # nats: whether log-weights are compiled depends on the work that remains, which changes rounding
FIT = ("fit", "ppvae.models:vae", "--hidden", "50", "--latent", "4", "--no-report", "--compile", "no", "--resume")
EVALUATE = ("--num-particles", "1000", "--head", "300", "--bracket", "0", "--no-report", "--proposal", "guide")


def run(args: list[str], seconds: float | None = None) -> tuple[int, str]:
    """(exit status, last line of errors) of a command; SIGKILL ends it after so many seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ppvae", *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, error = process.communicate()
    return process.returncode, (error.strip().splitlines() or [""])[-1]


def until_finished(args: list[str], counts: dict[str, int], rng: random.Random, typical: float) -> None:
    """Repeats a command that is killed at random moments, until it ends by itself."""
    for _ in range(12):
        status, error = run(args, rng.uniform(0.3, 1.2) * typical)
        if status == -signal.SIGKILL:
            counts["kills"] += 1
            continue
        if status:
            counts["failures"] += 1
            print(f"failed: {' '.join(args)}: {error}", flush=True)
        return
    if run(args)[0]:
        counts["failures"] += 1


def same_parameters(one: Path, other: Path) -> bool:
    """Whether two runs end with the same parameters, to the last bit."""
    a, b = (list(load(folder).model.scope.params.values()) for folder in (one, other))  # names are unique to a pair
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def cycle(root: Path, epochs: int, seed: int, counts: dict[str, int], rng: random.Random) -> None:
    """One pair trained and evaluated twice, the second time under kills, and compared."""
    folders = {name: root / name for name in ("whole", "killed")}
    fits = {n: [*FIT, "--runs", str(root), "--name", n, "--epochs", str(epochs), "--seed", str(seed)] for n in folders}
    start = time.monotonic()
    counts["failures"] += bool(run(fits["whole"])[0])
    until_finished(fits["killed"], counts, rng, time.monotonic() - start)
    if not checkpoint.exists(folders["killed"] / "checkpoints"):
        counts["lost"] += 1
        return
    counts["fits"] += 1
    counts["other parameters"] += not same_parameters(*folders.values())
    start = time.monotonic()
    counts["failures"] += bool(run(["evaluate", str(folders["whole"]), *EVALUATE])[0])
    until_finished(["evaluate", str(folders["killed"]), *EVALUATE], counts, rng, time.monotonic() - start)
    one, other = (load_estimate(folder) for folder in folders.values())
    counts["evaluations"] += 1
    counts["other log p(x)"] += not torch.allclose(one.log_px, other.log_px, rtol=0, atol=TOLERANCE)
    largest = float((one.log_px - other.log_px).abs().max())
    counts["equal to the last bit"] += largest == 0
    print(f"largest difference of log p(x): {largest:.1e} nats", flush=True)
    left = [path.name for path in folders["killed"].rglob("*.tmp")]
    counts["temporaries left"] += len(left)


def main() -> int:
    """Cycles until the time is over; the exit status is 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="one short cycle")
    args = parser.parse_args()
    minutes, epochs = (0.0, 2) if args.smoke else (args.minutes, args.epochs)
    rng = random.Random(args.seed)
    names = (
        "cycles", "fits", "evaluations", "kills", "other parameters", "other log p(x)", "equal to the last bit",
        "failures", "lost", "temporaries left",
    )  # fmt: skip
    counts, start = dict.fromkeys(names, 0), time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    while not counts["cycles"] or time.monotonic() - start < 60 * minutes:
        root = Path(tempfile.mkdtemp(prefix="soak-"))
        cycle(root, epochs, args.seed + counts["cycles"], counts, rng)
        counts["cycles"] += 1
        shutil.rmtree(root)
        done = ", ".join(f"{name} {value}" for name, value in counts.items())
        print(f"{(time.monotonic() - start) / 60:.1f} min: {done}", flush=True)
    if not args.smoke:
        (RESULTS / "soak").mkdir(parents=True, exist_ok=True)
        stored = {"minutes": round((time.monotonic() - start) / 60, 1), **counts}
        (RESULTS / "soak" / "counts.json").write_text(json.dumps(stored, indent=1) + "\n")
    return int(any(counts[name] for name in ("other parameters", "other log p(x)", "failures", "lost")))


if __name__ == "__main__":
    sys.exit(main())
