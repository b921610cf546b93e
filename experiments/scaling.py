"""Throughput of training and of log p(x) on one process and on several, of one thread each, in one run.

The pair is the benchmark's (784-200-200-50): epochs of IWAE-50 by compiled steps, once in batches of 100, which the
processes share, and once in batches of 100 a process; log p(x) at K = 5000, whose data they share, eagerly. Each
measurement is a group of its own; its time is that of the slowest process. Two processes that know nothing of each
other, at the same time, show what the machine itself takes away (caches, bandwidth of the memory, clock): their
speed-up is the most that a group can have. The rows are stored in results/scaling/rows.json.

    python -m experiments.scaling
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from experiments.bench import SMOKE, Settings, processor
from experiments.bench.pairs import build, data
from experiments.cells import RESULTS, markdown
from ppvae import fit, log_marginal, objectives
from ppvae.distributed import DistributedContext, leave_process_group

EPOCHS = 4  # the first of which compiles
ROUNDS = 3  # of which the median counts
HEADER = ("", "one process", "two processes", "speed-up", "of two that share nothing")


def measure(smoke: bool) -> dict[str, float]:
    """Milliseconds of IWAE-50 for 100 data, for both sizes of a batch; microseconds of a log-weight of log p(x)."""
    s = SMOKE if smoke else Settings()
    pair, size = build("one layer", s), DistributedContext().size
    out = {
        "IWAE-50, a batch of 100, ms per 100 data": training_seconds(pair, s, s.batch, smoke) * 1e5,
        "IWAE-50, a batch of 100 a process, ms per 100 data": training_seconds(pair, s, size * s.batch, smoke) * 1e5,
    }
    few = data("one layer", 2 * s.num_eval)
    start = time.perf_counter()
    log_marginal(
        pair.model, pair.guide, few, num_particles=s.particles, compile=False, progress=False, proposal="guide"
    )
    taken = time.perf_counter() - start
    return out | {"log p(x), us": taken / (len(few) * s.particles) * 1e6}


def training_seconds(pair: Any, s: Settings, batch: int, smoke: bool) -> float:
    """Seconds of training for each datum, the median over epochs."""
    x, times = data("one layer", (2 if smoke else 25) * batch), []
    fit(
        pair.model, pair.guide, x, epochs=EPOCHS, batch_size=batch, objective=objectives.IWAE(s.iwae),
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3), compile=True, progress=False,
        callbacks=[lambda *_: times.append(time.perf_counter())], valid=x[:10],
    )  # fmt: skip
    return statistics.median(b - a for a, b in itertools.pairwise(times)) / len(x)


def start_group(count: int, smoke: bool) -> subprocess.Popen[str]:
    """Starts the measurements in a group of so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launch, "-m", "experiments.scaling", "--worker", *(["--smoke"] if smoke else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish_group(group: subprocess.Popen[str]) -> dict[str, float]:
    """The measurements of a group, by rank 0."""
    out, errors = group.communicate()
    if group.returncode:
        raise RuntimeError(errors)
    found: dict[str, float] = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    return found


def speed_ups(content: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """The rows of the table."""
    one, two, apart = content["one"], content["two"], content.get("apart", {})
    return [
        (
            what, f"{one[what]:.2f}", f"{two[what]:.2f}", f"{one[what] / two[what]:.2f}",
            f"{2 * one[what] / apart[what]:.2f}" if apart else "",
        )
        for what in one
    ]  # fmt: skip


def main() -> None:
    """Prints the table, and stores it unless it is that of `--smoke`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small networks")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if "RANK" in os.environ:
            torch.distributed.init_process_group("gloo")
        found = measure(args.smoke)
        if leave_process_group():
            print(json.dumps(found), flush=True)
        return
    rounds: dict[str, list[dict[str, float]]] = {"one": [], "two": [], "apart": []}
    for _ in range(1 if args.smoke else ROUNDS):  # in turn, as the clock of a machine drifts
        rounds["one"].append(finish_group(start_group(1, args.smoke)))
        rounds["two"].append(finish_group(start_group(2, args.smoke)))
        rounds["apart"] += [finish_group(group) for group in [start_group(1, args.smoke) for _ in range(2)]]
    one, two, apart = (
        {what: statistics.median(each[what] for each in found) for what in found[0]} for found in rounds.values()
    )
    print(f"{processor()}, {os.cpu_count()} cores, one thread a process")
    print(markdown(HEADER, speed_ups({"one": one, "two": two, "apart": apart})))
    if not args.smoke:
        (RESULTS / "scaling").mkdir(parents=True, exist_ok=True)
        content = {"machine": processor(), "cores": os.cpu_count(), "one": one, "two": two, "apart": apart}
        (RESULTS / "scaling" / "rows.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
