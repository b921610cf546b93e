"""Every plot draws into given axes, holds no warnings, and those of estimates take several."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from ppvae import plots
from ppvae.errors import UsageError
from ppvae.evaluation import (
    bracket,
    calibration,
    compare,
    gaps,
    gradients,
    log_marginal,
    predictive_check,
    representation,
)
from ppvae.models import LinearGaussian
from ppvae.objectives import ELBO


def estimate(shift: float = 0.0, count: int = 40, seed: int = 0) -> Any:
    torch.manual_seed(0)
    pair = LinearGaussian(3, 2)
    x = torch.randn(count, 3) + shift
    return log_marginal(pair.model, pair.mean_field, x, num_particles=50, seed=seed, proposal="guide")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    torch.manual_seed(0)
    pair = LinearGaussian(3, 2)
    x = torch.randn(30, 3)
    est = estimate()
    return {
        "one": est,
        "other": estimate(seed=1),
        "gaps": gaps(pair.model, pair.mean_field, x[:4], num_particles=30, steps=5),
        "representation": representation(pair.model, pair.mean_field, x),
        "calibration": calibration(pair.model, pair.guide, x, replications=40),
        "check": predictive_check(pair.model, pair.guide, x, {"a": lambda x: x.mean(1)}, calibrations=0),
        "gradients": gradients(pair.model, pair.mean_field, x, ELBO(2), ["pathwise", "stl"], draws=10),
        "bracket": bracket(pair.model, pair.mean_field, x, num_data=4, num_particles=30),
    }


HISTORY = [
    {"epoch": e, "loss": 9.0 / e, "valid_elbo": -8.0, "valid_rate": 1.0, "valid_distortion": 7.0} for e in (1, 2)
]
PLOTS: dict[str, tuple[int, Callable[[dict[str, Any], Any], Figure]]] = {  # panels, and the plot
    "bound_curve": (1, lambda r, ax: plots.bound_curve(r["one"], ax=ax)),
    "bracket": (1, lambda r, ax: plots.bracket(r["bracket"], ax=ax)),
    "calibration_ranks": (2, lambda r, ax: plots.calibration_ranks(r["calibration"], "z", ax=ax)),
    "curves": (3, lambda r, ax: plots.curves(HISTORY, ax=ax)),
    "density_maps": (2, lambda r, ax: plots.density_maps({"a": torch.zeros(5, 2), "b": torch.zeros(25)}, ax=ax)),
    "diagnosis": (2, lambda r, ax: plots.diagnosis(r["one"], ax=ax)),
    "differences": (1, lambda r, ax: plots.differences(compare({"a": r["one"], "b": r["other"]}), ax=ax)),
    "gap_bars": (1, lambda r, ax: plots.gap_bars({"a": r["gaps"]}, ax=ax)),
    "gradient_noise": (2, lambda r, ax: plots.gradient_noise(r["gradients"], ax=ax)),
    "image_grid": (1, lambda r, ax: plots.image_grid(torch.rand(3, 4), (2, 2), row_titles=["a"], ax=ax)),
    "kl_per_dim": (2, lambda r, ax: plots.kl_per_dim(r["representation"], "z", ax=ax)),
    "latent_map": (1, lambda r, ax: plots.latent_map(torch.rand(9, 2), torch.arange(9) % 3, ax=ax)),
    "log_px_histogram": (1, lambda r, ax: plots.log_px_histogram(r["one"], ax=ax)),
    "looseness_curve": (2, lambda r, ax: plots.looseness_curve(r["other"], r["one"], ax=ax)),
    "parallel_coordinates": (
        2, lambda r, ax: plots.parallel_coordinates({t: {"x": torch.rand(3), "y": torch.rand(3)} for t in "ab"}, ax=ax),
    ),
    "predictive_checks": (2, lambda r, ax: plots.predictive_checks(r["check"], "a", ax=ax)),
    "rate_distortion": (1, lambda r, ax: plots.rate_distortion({"a": r["representation"]}, ax=ax)),
}  # fmt: skip


def test_every_plot_is_in_the_list():
    functions = [name for name in plots.__all__ if callable(getattr(plots, name))]
    figures = {name for name in functions if "ax" in inspect.signature(getattr(plots, name)).parameters}
    assert figures == set(PLOTS)
    assert set(plots.__all__) - figures == {"DPI", "notes", "plane", "to_png"}


@pytest.mark.parametrize("name", PLOTS)
def test_plots_draw_into_given_axes(results, name):
    panels, draw = PLOTS[name]
    fig = Figure(figsize=(12, 4), layout="constrained")
    axes = fig.subplots(1, panels + 1)
    empty, given = axes[0], axes[1:]
    assert draw(results, given[0] if panels == 1 else list(given)) is fig
    assert "_repr_png_" not in vars(fig)
    for ax in given:
        assert ax.has_data() or ax.images
    assert not empty.has_data()
    assert not fig.legends
    assert len(fig.axes) == panels + 1
    fig.set_dpi(40)
    assert plots.to_png(fig).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [name for name, (panels, _) in PLOTS.items() if panels > 1])
def test_another_number_of_axes_is_refused(results, name):
    panels, draw = PLOTS[name]
    with pytest.raises(UsageError, match=f"ax: expected {panels} axes, one for each panel, found 1"):
        draw(results, Figure().add_subplot())


def test_several_estimates_share_a_plot(results):
    both = {"small": results["one"], "large": results["other"]}
    curves = {line.get_label(): line.get_ydata() for line in plots.bound_curve(both).axes[0].lines}
    for name, est in both.items():
        np.testing.assert_allclose(curves[name], [float(est.bounds[k].mean()) for k in sorted(est.bounds)])
    labels = plots.log_px_histogram(both).axes[0].get_legend_handles_labels()[1]
    assert [label.split(",")[0] for label in labels] == ["small", "large"]
    shown = plots.diagnosis(both)
    points = {c.get_label(): len(c.get_offsets()) for c in shown.axes[0].collections}
    assert sum(n for label, n in points.items() if label.startswith("small")) == len(results["one"].log_px)
    for draw in (plots.bound_curve, plots.log_px_histogram, plots.diagnosis):
        with pytest.raises(UsageError, match="expected one estimate or more"):
            draw({})


def test_a_figure_of_a_comparison_holds_no_warnings(results):
    comparison = compare({"a": results["one"], "b": results["other"]})
    assert comparison.warnings
    fig = plots.differences(comparison)
    texts = [t.get_text() for t in fig.axes[0].texts]
    assert not any("warning" in t for t in texts)
    assert "see the table" in plots.notes(fig)[0]


def texts_outside(fig: Figure) -> list[str]:
    """The texts, tick labels aside, that leave the figure by more than a pixel."""
    fig.draw_without_rendering()
    ticks = {id(t) for ax in fig.axes for t in (*ax.get_xticklabels(), *ax.get_yticklabels())}
    shown = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in ticks]
    frames = {t.get_text(): t.get_window_extent() for t in shown}
    width, height = fig.bbox.size
    return [
        words for words, b in frames.items() if min(b.x0, b.y0) < -1 or b.x1 > width + 1 or b.y1 > height + 1
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name, (panels, _) in PLOTS.items() if panels == 1])
def test_texts_stay_in_a_figure_of_a_paper_column(results, name):
    fig = Figure(figsize=(3.3, 2.2), layout="constrained")
    PLOTS[name][1](results, fig.subplots())
    assert texts_outside(fig) == []


@pytest.mark.parametrize("second", ["differences", "log_px_histogram", "bound_curve", "gap_bars"])
def test_texts_stay_in_a_figure_of_two_panels(results, second):
    fig = Figure(figsize=(7, 2.5), layout="constrained")
    left, right = fig.subplots(1, 2)
    PLOTS["differences"][1](results, left)
    PLOTS[second][1](results, right)
    assert texts_outside(fig) == []
