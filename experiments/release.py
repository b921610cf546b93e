"""Trained models to share: for each row of `published` a run folder, loaded by `ppvae.load` and `ppvae evaluate`.

Rows are those whose weights are kept in `results/published/weights`; nothing is trained. A folder holds config.json,
metrics.jsonl, a checkpoint of parameters alone, and published.json, the row's cell with its figures. From the root of
the repository, `python -m ppvae evaluate FOLDER --head N --root DATA` prints those of the first N test images again.
Factories of `experiments`, which rows of two layers have, are trusted.

    python -m experiments.release
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from experiments import cells
from ppvae import load
from ppvae.storage import write_json

LARGEST = 20 << 20  # bytes of a folder


def release(cell: dict[str, Any], weights: Path, to: Path) -> Path | None:
    """The folder of a cell's run, which is loaded once; None where its weights are not kept.

    Raises SystemExit for a folder of 20 MiB or more, and for weights of another run than the cell's.
    """
    kept, folder = weights / Path(cell["result"]["run"]).name, to / f"{cell['cell']['row']}-{cell['cell']['seed']}"
    if not kept.exists():
        return None
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    write_json(folder / "published.json", cell)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size >= LARGEST:
        raise SystemExit(f"{folder}: expected less than {LARGEST >> 20} MiB, found {size / 2**20:.1f}")
    loaded = load(folder, trust=True)
    if (found := loaded.metrics["valid_elbo"]) != (expected := cell["result"]["valid_elbo"]):
        raise SystemExit(f"{kept}: is not the run of {folder.name}: its validation ELBO is {found}, not {expected}")
    shape = [1, *loaded.config["batch"][0][0][1:]]
    with torch.no_grad():
        loaded.guide(torch.zeros(shape))
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return folder


def main(args: list[str] | None = None) -> None:
    """Writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the rows of `python -m experiments.published --smoke`")
    parser.add_argument("--to", type=Path, default=Path("runs/release"), help="the folder of the folders")
    given = parser.parse_args(args)
    results = Path("runs/smoke/published") if given.smoke else cells.RESULTS / "published"
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    made = [release(cell, results / "weights", given.to) for cell in found]
    if not any(made):
        raise SystemExit(f"no weights are kept in {results}: python -m experiments.published trains and keeps them")


if __name__ == "__main__":
    main()
