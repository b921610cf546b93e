"""The report of a run: one HTML file with what was trained, what it generates, and how far log p(x) can be trusted."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae import plots
from ppvae.errors import PpvaeError, UsageError
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.imputation import impute
from ppvae.report.headline import head
from ppvae.report.of_estimate import worst
from ppvae.report.of_pair import interpolations, reconstructions, samples, traversals
from ppvae.report.page import page
from ppvae.report.parts import Section, log, section
from ppvae.report.sections import of_latents, sections
from ppvae.report.subject import Subject

if TYPE_CHECKING:
    from ppvae.training import Run

__all__ = ["generated", "pictures", "worst", "write"]


def write(
    run: Run,
    *,
    data: Any,
    estimate: Estimate | None = None,
    directory: str | os.PathLike[str] | None = None,
    seed: int = 0,
    labels: Any = None,
) -> Path:
    """Writes `report.html`, which needs no other file, and its pictures to `pictures/*.png`; returns the page's path.

    What a pair does not allow to be drawn (a latent that is no vector, no estimate) is left out with a sentence.

    Args:
        run: a trained pair.
        data: the test data: a tensor [N, *event], a split, or a tuple of them, as the estimate was made of.
        estimate: what `log_marginal` said of these data.
        directory: where to write; the run's folder by default.
        seed: of everything that is generated.
        labels: [N], for the latent map; the split's own by default.

    Raises:
        UsageError: there is no folder to write to; CheckpointError: a file cannot be written.
    """
    folder = _folder(run, directory)
    subject = Subject(run, data, estimate, seed, labels)
    made = _drawn(subject, folder / "pictures")
    folded = {"Settings of the run": _settings(run)}
    if subject.structure is not None:
        folded["The pair as found"] = "\n".join(
            w for w in subject.structure.description if not w.startswith("data plate")
        )
    if estimate is not None:
        folded["The estimate in words"] = estimate.summary()
    text = page(head(subject), [(part, png) for part, png, _ in made], folded)
    path = folder / "report.html"
    _write(path, text.encode())
    return path


def pictures(
    run: Run,
    *,
    data: Any,
    estimate: Estimate | None = None,
    directory: str | os.PathLike[str] | None = None,
    seed: int = 0,
    labels: Any = None,
) -> dict[str, Path]:
    """Writes the report's pictures alone, `pictures/<name>.png`, and returns their paths by name; see `write`."""
    made = _drawn(Subject(run, data, estimate, seed, labels), _folder(run, directory) / "pictures")
    return {part.key: path for part, _, path in made if path is not None}


def generated(
    run: Run, data: Any, directory: str | os.PathLike[str] | None = None, *, count: int = 64, seed: int = 0
) -> list[Path]:
    """Writes samples, reconstructions, interpolations and traversals to `generated/`, as pictures and as arrays.

    An array has the events in its last dims: samples and reconstructions [count, ...] (of the first data),
    interpolations [pairs, steps, ...], traversals [dims, values, ...]. What cannot be made is logged and left out. Data
    with missing values get `imputations.npz`: ten imputations of every datum, their mean, and how far to trust them.
    """
    if count < 1:
        raise UsageError(f"count: expected at least 1, found {count}")
    folder, s = _folder(run, directory) / "generated", Subject(run, data, None, seed)
    parts = [
        section("samples", "Samples", lambda: samples(s, count)),
        section("reconstructions", "Reconstructions", lambda: reconstructions(s, count)),
        section("interpolations", "Interpolations", lambda: interpolations(s)),
        *of_latents(s, "traversals", "Traversals", traversals),
    ]
    paths = []
    for part in parts:
        if part.drawn is None or part.drawn.values is None:
            log.warning("%s left out: %s", part.key, part.why)
            continue
        buffer = io.BytesIO()
        np.save(buffer, part.drawn.values.numpy())
        for suffix, content in (("png", plots.to_png(part.drawn.figure)), ("npy", buffer.getvalue())):
            paths.append(folder / f"{part.key}.{suffix}")
            _write(paths[-1], content)
    if getattr(s.columns[0], "missing", False):
        try:
            buffer = io.BytesIO()
            np.savez(buffer, **impute(run.model, run.guide, s.columns, seed=seed).arrays())
            paths.append(folder / "imputations.npz")
            _write(paths[-1], buffer.getvalue())
        except PpvaeError as error:
            log.warning("imputations left out: %s", error)
    return paths


def _drawn(subject: Subject, folder: Path) -> list[tuple[Section, bytes | None, Path | None]]:
    """Every section with its picture, which is written too; a picture that can no longer be drawn is removed."""
    out: list[tuple[Section, bytes | None, Path | None]] = []
    for part in sections(subject):
        path, png = folder / f"{part.key}.png", None
        if part.drawn is None:
            path.unlink(missing_ok=True)
        else:
            png = plots.to_png(part.drawn.figure)
            _write(path, png)
        out.append((part, png, path if png is not None else None))
    return out


def _folder(run: Run, directory: str | os.PathLike[str] | None) -> Path:
    folder = directory if directory is not None else run.directory
    if folder is None:
        raise UsageError("directory: expected a folder to write to, found none, and the run has none either")
    return Path(folder)


def _write(path: Path, content: bytes) -> None:
    from ppvae.storage import write_bytes

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path.parent}: could not be made ({error.strerror})") from error
    write_bytes(path, content)


def _settings(run: Run) -> str:
    if not run.config:
        return "The run was made without a folder, so that its settings were not kept."
    return json.dumps(run.config, indent=2, ensure_ascii=False, default=str)
