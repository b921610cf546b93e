"""Writes the report of a run, its pictures, and generated data as pictures and arrays."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ppvae import plots
from ppvae.errors import PpvaeError, UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.imputation import impute
from ppvae.report.contents import all_sections, sections_of_latents
from ppvae.report.header import page_header
from ppvae.report.html import render_page
from ppvae.report.run_data import RunData
from ppvae.report.samples_section import interpolations, reconstructions, samples, traversals
from ppvae.report.section import Section, build_section, logger
from ppvae.storage import write_bytes
from ppvae.training.run import Run


def write(
    run: Run,
    *,
    data: Any,
    estimate: Estimate | None = None,
    directory: str | os.PathLike[str] | None = None,
    seed: int = 0,
    labels: Any = None,
) -> Path:
    """Writes `report.html`, which needs no other file, and its pictures `pictures/*.png`; returns the path of the page.

    A section that is not available for a pair (a latent that is not a vector, no estimate) states the reason instead.

    Args:
        run: a trained pair.
        data: the test data: a tensor [N, *event], a split, or a tuple of them; the data of the estimate.
        estimate: the result of `log_marginal` on these data.
        directory: the output folder; the run's folder by default.
        seed: the seed of everything that is generated.
        labels: [N], for the latent map; the labels of the split by default.

    Raises:
        UsageError: there is no output folder; CheckpointError: a file cannot be written.
    """
    folder = _output_folder(run, directory)
    run_data = RunData(run, data, estimate, seed, labels)
    rendered = _render_sections(run_data, folder / "pictures")
    details = {"Settings of the run": _settings(run)}
    if run_data.structure is not None:
        lines = [text for text in run_data.structure.description if not text.startswith("data plate")]
        details["Sites and parameters"] = "\n".join(lines)
    if estimate is not None:
        details["Summary of the estimate"] = estimate.summary()
    html = render_page(page_header(run_data), [(section, png) for section, png, _ in rendered], details)
    path = folder / "report.html"
    _write(path, html.encode())
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
    """Writes the pictures of the report alone, `pictures/<name>.png`; returns their paths by name; see `write`."""
    folder = _output_folder(run, directory) / "pictures"
    rendered = _render_sections(RunData(run, data, estimate, seed, labels), folder)
    return {section.key: path for section, _, path in rendered if path is not None}


def write_generated(
    run: Run, data: Any, directory: str | os.PathLike[str] | None = None, *, count: int = 64, seed: int = 0
) -> list[Path]:
    """Writes samples, reconstructions, interpolations and traversals to `generated/`, as pictures and as arrays.

    The event dims of an array come last: samples and reconstructions [count, ...] (of the first data), interpolations
    [pairs, steps, ...], traversals [dims, values, ...]. A kind that is not available is logged and left out. For data
    with missing values, `imputations.npz` holds ten imputations of each datum, their mean and their reliability.

    Raises:
        UsageError: `count` is below 1, or there is no output folder; CheckpointError: a file cannot be written.
    """
    check_numbers(count=count, seed=seed)
    folder, run_data = _output_folder(run, directory) / "generated", RunData(run, data, None, seed)
    sections = [
        build_section("samples", "Samples", lambda: samples(run_data, count)),
        build_section("reconstructions", "Reconstructions", lambda: reconstructions(run_data, count)),
        build_section("interpolations", "Interpolations", lambda: interpolations(run_data)),
        *sections_of_latents(run_data, "traversals", "Traversals", traversals),
    ]
    paths = []
    for section in sections:
        if section.content is None or section.content.values is None:
            logger.warning("%s left out: %s", section.key, section.reason)
            continue
        buffer = io.BytesIO()
        np.save(buffer, section.content.values.numpy())
        for suffix, content in (("png", plots.to_png(section.content.figure)), ("npy", buffer.getvalue())):
            paths.append(folder / f"{section.key}.{suffix}")
            _write(paths[-1], content)
    columns = dict(zip(run_data.names, run_data.columns, strict=True)) if run_data.names else run_data.columns
    if any(getattr(column, "missing", False) for column in run_data.columns):
        try:
            buffer = io.BytesIO()
            np.savez(buffer, **impute(run.model, run.guide, columns, seed=seed).arrays())
            paths.append(folder / "imputations.npz")
            _write(paths[-1], buffer.getvalue())
        except PpvaeError as error:
            logger.warning("imputations left out: %s", error)
    return paths


def _render_sections(run_data: RunData, folder: Path) -> list[tuple[Section, bytes | None, Path | None]]:
    """Each section with its PNG and the file of it; the file of a section without a figure is removed."""
    out: list[tuple[Section, bytes | None, Path | None]] = []
    for section in all_sections(run_data):
        path = folder / f"{section.key}.png"
        if section.content is None:
            path.unlink(missing_ok=True)
            out.append((section, None, None))
        else:
            png = plots.to_png(section.content.figure)
            _write(path, png)
            out.append((section, png, path))
    return out


def _output_folder(run: Run, directory: str | os.PathLike[str] | None) -> Path:
    if not isinstance(run, Run):
        raise UsageError(
            f"run: expected the result of fit or load, found {type(run).__name__}. Of a pair that was trained by hand: "
            f"training.Run(*inference.from_param_store(model, guide), history=[])"
        )
    folder = directory if directory is not None else run.directory
    if folder is None:
        raise UsageError("directory: expected a folder to write to, found none, and the run has none either")
    return Path(folder)


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path.parent}: the folder could not be created ({error.strerror})") from error
    write_bytes(path, content)


def _settings(run: Run) -> str:
    if not run.config:
        return "The run has no folder, so its settings were not stored."
    return json.dumps(run.config, indent=2, ensure_ascii=False, default=str)
