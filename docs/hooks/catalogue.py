"""The catalogue: a page for each part, model, network and objective."""

import hashlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "pictures"
ROOMS = {
    "priors": ("Priors p(z)", "A prior takes nothing and returns a distribution over z."),
    "likelihoods": ("Likelihoods p(x | z)", "A likelihood takes z and returns a distribution over x."),
    "posteriors": ("Posteriors q(z | x)", "A posterior takes x and returns a distribution over z: the guide of a VAE."),
    "models": ("Models", "A model is a pair: it has `.model` and `.guide`, and goes to `fit` and `log_marginal`."),
    "nn": ("Networks", "Each takes any leading dims, so that it broadcasts over particles."),
    "objectives": ("Objectives", "An objective is a `pyro.infer.ELBO`: for `fit(objective=...)` and Pyro's `SVI`."),
}  # fmt: skip
INTRODUCTION = """# Catalogue

Each part is a module that returns a distribution; another part is another object passed to `VAE`. Incompatible parts
are refused before training, in one sentence that names both. On the command line, `--prior`, `--likelihood` and
`--posterior` take the class's name, with the arguments of the class as further flags.
"""
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")
Entries = dict[str, dict[str, dict[str, str]]]


def entries() -> Entries:
    """parts.toml: {room: {part: {formula, use, reference}}}."""
    return tomllib.loads((ROOT / "docs/catalogue/parts.toml").read_text())


def pages() -> tuple[dict[str, str | bytes], list[str | dict[str, object]]]:
    """Pages and pictures by path, and the navigation."""
    drawn = _pictures()
    made: dict[str, str | bytes] = {f"catalogue/pictures/{p.name}": p.read_bytes() for p in drawn.values()}
    nav: list[str | dict[str, object]] = ["catalogue/index.md"]
    front = [INTRODUCTION]
    for room, parts in entries().items():
        title, sentence = ROOMS[room]
        rows = [
            f"| [{name}]({{}}{name}.md) | {entry['use']} | {_linked(entry['reference'])} |"
            for name, entry in parts.items()
        ]
        table = "\n".join(["| | when to use | reference |", "|---|---|---|", *rows])
        made[f"catalogue/{room}/index.md"] = f"# {title}\n\n{sentence}\n\n{table.replace('{}', '')}\n"
        front.append(f"## [{title}]({room}/index.md)\n\n{sentence}\n\n{table.replace('{}', room + '/')}\n")
        places = [f"catalogue/{room}/{name}.md" for name in parts]
        nav.append({title: [f"catalogue/{room}/index.md", *places]})
        for name, entry in parts.items():
            made[f"catalogue/{room}/{name}.md"] = _page(room, name, entry, f"{room}.{name}" in drawn)
    made["catalogue/index.md"] = "\n".join(front)
    return made, nav


def _page(room: str, name: str, entry: dict[str, str], drawn: bool) -> str:
    lines = [f"# {name}", ""]
    if "formula" in entry:
        lines += [f"$$ {entry['formula']} $$", ""]
    if drawn:
        lines += [f"![{name}](../pictures/{room}.{name}.png){{ align=right width=330 }}", ""]
    lines += [f"**When to use.** {entry['use']}", "", f"**Source.** {_linked(entry['reference'])}", ""]
    options = f"    options: {{heading: ppvae.{room}.{name}, toc_label: Reference}}"
    return "\n".join([*lines, f"::: ppvae.{room}.{name}", options, ""])


def _linked(reference: str) -> str:
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", reference)


def _pictures() -> dict[str, Path]:
    """Drawn anew when the package, the constructors or the drawing have changed."""
    rooms = ("distributions", "nn", "priors", "likelihoods", "posteriors", "models")
    package = [p for room in rooms for p in (ROOT / "ppvae" / room).glob("*.py")]
    sources = [*package, *(ROOT / "tests/laws").glob("*.py"), Path(__file__).with_name("pictures.py")]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(sources))).hexdigest()[:16]
    folder = CACHE / key
    if not folder.exists():
        script = Path(__file__).with_name("pictures.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, script, folder], check=True, env=environment, cwd=ROOT)
    return {p.stem: p for p in folder.glob("*.png")}
