"""Tables of pages from the files of experiments/results: `python docs/hooks/tables.py` writes them.

A test holds that the written tables are those of the files.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
METHODS = {
    "guide": "guide, K = 5000",
    "refined": "refined, K = {num_particles}",
    "annealed": "annealing, 8 chains, 500 temperatures",
}


def trust() -> str:
    """log p(x) by three estimates and what each costs."""
    rows = ["| model | log p(x) by | mean | below annealing | reliable | ms an image |", "|---|---|---|---|---|---|"]
    for layers, cell in (("one layer", "1-VAE-1-0"), ("two layers", "2-VAE-1-0")):
        result: dict[str, Any] = json.loads((RESULTS / "trust" / f"{cell}.json").read_text())["result"]
        for method, name in METHODS.items():
            below, error = result[f"{method}_below"], result[f"{method}_below_error"]
            short = "" if method == "annealed" else f"{below:.3f} ± {error:.3f} nats"
            rows.append(
                f"| {layers} | {name.format(**result)} | {result[f'{method}_first']:.3f} | {short} | "
                f"{result[f'{method}_reliable']:.1%} | {1000 * result[f'{method}_seconds']:.0f} |"
            )
    return "\n".join(rows) + "\n"


def load() -> str:
    """Time and memory of training and of log p(x) as data grow, and counts of a soak."""
    header = (
        "N",
        "K",
        "epoch: CPU s",
        "MiB more",
        "log p(x): CPU s",
        "CPU s per 10^6 N K",
        "MiB more",
        "bytes a datum",
    )
    rows = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for row in json.loads((RESULTS / "load" / "rows.json").read_text()):
        n, k, mib = row["num_data"], row["num_particles"], row["mib"]
        cells = (
            f"{n:,}", f"{k:,}", f"{row['fit_seconds']:.1f}", f"{row['fit_mib']:.0f}", f"{row['seconds']:.1f}",
            f"{1e6 * row['seconds'] / (n * k):.2f}", f"{mib:.0f}", f"{mib * 2**20 / n:.0f}",
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    soak = json.loads((RESULTS / "soak" / "counts.json").read_text())
    wrong = sum(soak[name] for name in ("other parameters", "other log p(x)", "failures", "lost", "temporaries left"))
    rows += [
        "",
        f"In {soak['minutes']:.0f} minutes of fits and evaluations that SIGKILL ended {soak['kills']} times at random, "
        f"{soak['fits']} runs ended with the parameters of runs that were left alone, to the last bit, and their "
        f"{soak['evaluations']} estimates agree ({soak['equal to the last bit']} to the last bit); {wrong} were lost, "
        f"failed or left temporary files.",
    ]
    return "\n".join(rows) + "\n"


def scaling() -> str:
    """Speed-ups on two processes, and time and memory on data that stay on disk."""
    from experiments import scaling as processes
    from experiments import streaming
    from experiments.cells import markdown

    content = json.loads((RESULTS / "scaling" / "rows.json").read_text())
    rows = json.loads((RESULTS / "streaming" / "rows.json").read_text())["rows"]
    speed_ups = markdown(processes.HEADER, processes.speed_ups(content))
    return (
        f"On {content['cores']} cores of an {content['machine']}, one thread a process:\n\n{speed_ups}\n\n"
        f"One epoch and log p(x) at K = {streaming.PARTICLES} of N rows of {streaming.DIMS} numbers in a file:"
        f"\n\n{streaming.table(rows)}\n"
    )


def published() -> str:
    """Published figures beside ours, sorted by the difference, with samples and learning curves."""
    from experiments import published as experiment

    return experiment.page()


TABLES = {
    "docs/howto/trust_table.md": trust,
    "docs/howto/load_table.md": load,
    "docs/results/published_table.md": published,
    "docs/results/scaling_table.md": scaling,
}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for place, make in TABLES.items():
        (ROOT / place).write_text(make())
