"""The drawing of the architecture: the floors of tests/test_architecture.py, as SVG."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = {"distributions", "nn", "priors", "likelihoods", "posteriors", "models"}
COLUMNS = {"parts": 20, "work": 380, "both": 200}
WIDTH, HEIGHT, GAP = 340, 30, 12


def svg() -> str:
    """One box a floor: parts left, what works on pairs right, what both rest on or meet in across."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text())
    (value,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "FLOORS"]
    floors = [floor.split() for floor in ast.literal_eval(value) if floor != "__main__"]
    first = next(i for i, rooms in enumerate(floors) if PARTS & set(rooms))
    last = next(i for i, rooms in enumerate(floors) if "report" in rooms)
    rows = {"parts": first, "work": first}
    boxes = []
    for i, rooms in enumerate(floors):
        column = "both" if i < first else "parts" if PARTS & set(rooms) else "work" if i < last else "both"
        row = rows[column] if column in rows else i if i < first else i - last + max(rows.values())
        if column in rows:
            rows[column] += 1
        boxes.append(_box(COLUMNS[column], 10 + row * (HEIGHT + GAP), "   ".join(rooms), column))
    height = 10 + (max(rows.values()) + len(floors) - last) * (HEIGHT + GAP)
    style = (
        "text{font:14px ui-monospace,monospace;text-anchor:middle;fill:#1a237e}"
        ".parts{fill:#ffe0d6}.work{fill:#d8ddf5}.both{fill:#dcefe9}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 {height}" role="img">'
        f"<title>Rooms by floor: a room imports only rooms above it</title><style>{style}</style>{''.join(boxes)}</svg>"
    )


def _box(x: int, y: int, text: str, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{x + WIDTH // 2}" y="{y + 20}">{text}</text>'
    )
