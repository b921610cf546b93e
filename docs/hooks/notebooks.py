"""Tutorials: the notebooks, run, with their outputs as Markdown. What has been run is kept in .cache/notebooks."""

import base64
import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "notebooks"


def pages() -> tuple[dict[str, str | bytes], list[str | dict[str, str]]]:
    """Pages and pictures by path, and the navigation."""
    made: dict[str, str | bytes] = {}
    nav: list[str | dict[str, str]] = []
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    with ThreadPoolExecutor(2) as pool:  # each runs in a process of its own
        rendered = list(pool.map(_rendered, paths))
    for path, (text, pictures) in zip(paths, rendered, strict=True):
        made[f"tutorials/{path.stem}.md"] = text
        made.update({f"tutorials/{name}": base64.b64decode(content) for name, content in pictures.items()})
        nav.append(f"tutorials/{path.stem}.md")
    return made, nav


def _rendered(path: Path) -> tuple[str, dict[str, str]]:
    used = [p for p in sorted((ROOT / "ppvae").rglob("*.py")) if p.parent.name not in ("cli", "report")]
    sources = [path, *used]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    kept = CACHE / f"{path.stem}-{key}.json"
    if not kept.exists():
        rendered = _run(path)
        CACHE.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(rendered))
    text, pictures = json.loads(kept.read_text())
    return text, pictures


def _run(path: Path) -> tuple[str, dict[str, str]]:
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as sockets:  # over TCP the kernel warns of readable messages
        ipc = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        NotebookClient(notebook, config=ipc, timeout=900, resources={"metadata": {"path": ROOT}}).execute()
    for cell in notebook.cells:  # the log and warnings of the machine that built the site are no part of it
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    exporter = MarkdownExporter()
    text, resources = exporter.from_notebook_node(
        notebook, {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    )
    note = f"<small>The notebook `notebooks/{path.name}`, as it was run for this page.</small>\n"
    head, _, rest = text.partition("\n")
    pictures = {name: base64.b64encode(content).decode() for name, content in resources["outputs"].items()}
    return f"{head}\n\n{note}\n{rest}", pictures
