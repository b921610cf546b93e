"""Trained models to share: for each row of `published` a run folder, loaded by `ppvae.load` and `ppvae evaluate`.

Rows are those whose runs are still below `runs/`. A folder holds config.json, metrics.jsonl, the last checkpoint and
published.json, the row's cell with its figures; `ppvae evaluate FOLDER --head N --root DATA` prints those of the first
N test images again.

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


def release(cell: dict[str, Any], to: Path) -> Path | None:
    """The folder of a cell's run, which is loaded once; None where the run is not there any more.

    Raises SystemExit for a folder of 20 MiB or more.
    """
    run, folder = Path(cell["result"]["run"]), to / f"{cell['cell']['row']}-{cell['cell']['seed']}"
    if not (run / "checkpoints" / "last").exists():
        return None
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    last = (run / "checkpoints" / "last").read_text().strip()
    for name in ("config.json", "metrics.jsonl", "checkpoints/last", f"checkpoints/{last}"):
        shutil.copyfile(run / name, folder / name)
    write_json(folder / "published.json", cell)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size >= LARGEST:
        raise SystemExit(f"{folder}: expected less than {LARGEST >> 20} MiB, found {size / 2**20:.1f}")
    loaded = load(folder)
    shape = [1, *loaded.config["batch"][0][0][1:]]
    with torch.no_grad():
        loaded.guide(torch.zeros(shape))
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return folder


def main(args: list[str] | None = None) -> None:
    """Writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the runs of `python -m experiments.published --smoke`")
    parser.add_argument("--to", type=Path, default=Path("runs/release"), help="the folder of the folders")
    given = parser.parse_args(args)
    results = Path("runs/smoke/published") if given.smoke else cells.RESULTS / "published"
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    made = [release(cell, given.to) for cell in found]
    if not any(made):
        raise SystemExit(f"no run of {results} is there: python -m experiments.published trains them")


if __name__ == "__main__":
    main()
