"""Tables of pages from the files of experiments/results: `python docs/hooks/tables.py` writes them.

A test holds that the written tables are those of the files.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
METHODS = {
    "guide": "guide, K = 5000",
    "refined": "refined, K = 3500",
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
                f"| {layers} | {name} | {result[f'{method}_first']:.3f} | {short} | "
                f"{result[f'{method}_reliable']:.1%} | {1000 * result[f'{method}_seconds']:.0f} |"
            )
    return "\n".join(rows) + "\n"


TABLES = {"docs/howto/trust_table.md": trust}

if __name__ == "__main__":
    for place, make in TABLES.items():
        (ROOT / place).write_text(make())
