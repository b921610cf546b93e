"""Pictures of gaps, latents, calibration and comparisons, and their sections in a report."""

import math

import numpy as np
import pytest
import torch

from ppvae import VAE, fit, likelihoods, nn, plots, posteriors, priors
from ppvae.errors import UsageError
from ppvae.evaluation.calibration import Calibration, p_value, pointwise_p_values
from ppvae.evaluation.compare import compare
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.local.gaps import Gaps
from ppvae.evaluation.representation import Representation
from ppvae.report.results_section import results_sections
from ppvae.report.run_data import RunData


def gaps_of(amortisation=0.5, approximation=1.0, richer=0.7, n=40):
    torch.manual_seed(0)
    elbo = -20 + torch.randn(n).double()
    best = elbo + amortisation + 0.01 * torch.randn(n)
    return Gaps(
        log_px=best + approximation, log_px_error=0.01 * torch.ones(n).double(), reliable=torch.arange(n) > 2,
        elbo=elbo, best_elbo=best, richer_elbo=None if richer is None else best + richer,
        gained=torch.zeros(n).double(), refit="each datum has distributions of its own", richer="a normal",
        log_px_from="given", num_particles=100, steps=10, rounds=2, seed=0, data="made by hand",
    )  # fmt: skip


def representation_of(dims=12, active=5, whole=False, n=60):
    torch.manual_seed(1)
    kl = torch.where(torch.arange(dims) < active, 1.5, 0.001).double()
    rate = kl.sum() + 0.3 * torch.randn(n).double()
    return Representation(
        rate=rate, distortion=80 + torch.randn(n).double(), kl={"z": kl.sum(0, keepdim=True) if whole else kl},
        kl_error={"z": torch.full((1 if whole else dims,), 0.05).double()}, variance={"z": kl / 2},
        surgery_rate=rate, information_lower=rate - 3, information_upper=rate - 2.5, num_particles=10, seed=0,
    )  # fmt: skip


def calibration_of(bad=(1,), dims=3, count=500):
    torch.manual_seed(2)
    ranks = torch.randint(100, (count, dims))
    for d in bad:
        ranks[:, d] = (ranks[:, d] * 0.7).long()  # too many low ranks
    table = pointwise_p_values(count, 100)
    p = torch.tensor([p_value(r, 100, table) for r in ranks.T]).double()
    return Calibration(ranks={"z": ranks}, p_values={"z": p}, num_draws=99, alpha=0.01, seed=0, data="made by hand")


def words_of(figure):
    figure.draw_without_rendering()
    out = [t.get_text() for ax in figure.axes for t in [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]]
    out += [t.get_text() for ax in figure.axes for t in ax.get_yticklabels()]
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    return " | ".join(out + [t.get_text() for legend in legends for t in legend.get_texts()])


@pytest.mark.parametrize("richer", [None, 0.7])
def test_bars_add_up_to_the_inference_gap(richer):
    found = {"train": gaps_of(richer=richer), "test": gaps_of(0.9, richer=richer)}
    figure = plots.gap_bars(found)
    for y, one in enumerate(found.values()):
        own = [p for p in figure.axes[0].patches if abs(p.get_y() + p.get_height() / 2 - y) < 0.1]
        assert len(own) == (2 if richer is None else 3)
        assert sum(p.get_width() for p in own) == pytest.approx(float(one.inference.mean()))
        assert own[0].get_width() == pytest.approx(float(one.amortisation.mean()))
        ends = np.cumsum([0.0, *(p.get_width() for p in own)])
        assert [p.get_x() for p in own] == pytest.approx(list(ends[:-1]))
    words = words_of(figure)
    assert "1.50 ±" in words
    assert "1.90 ±" in words
    assert "amortisation gap" in words
    assert "train" in words
    with pytest.raises(UsageError):
        plots.gap_bars({})


@pytest.mark.parametrize("change", [{"amortisation": -0.2}, {"amortisation": math.nan}, {"n": 1}])
def test_hard_gaps_are_drawn(change):
    assert plots.to_png(plots.gap_bars({"only": gaps_of(**change)}))


def test_dims_are_in_order_of_their_rate_and_counted():
    figure = plots.kl_per_dim(representation_of(), "z")
    heights = sorted(((p.get_x(), p.get_height()) for p in figure.axes[0].patches), key=lambda p: p[0])
    assert np.all(np.diff([h for _, h in heights]) <= 1e-9)
    assert sum(h for _, h in heights) == pytest.approx(5 * 1.5 + 7 * 0.001)
    words = words_of(figure)
    assert "5 of 12 active" in words
    assert "not active" in words
    assert "the whole latent" in words_of(plots.kl_per_dim(representation_of(whole=True), "z"))
    with pytest.raises(UsageError, match="expected one of"):
        plots.kl_per_dim(representation_of(), "y")


def test_rate_and_distortion_stand_where_they_are():
    one = representation_of()
    figure = plots.rate_distortion({"test": one})
    points = [line.get_xydata() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert points[0][0] == pytest.approx([float(one.rate.mean()), float(one.distortion.mean())])
    assert f"−{-float(one.elbo.mean()):.2f}" in words_of(figure)
    assert plots.to_png(plots.rate_distortion({"a": one, "b": representation_of(active=2)}))


def test_a_dim_that_departs_leaves_the_band_and_is_named():
    found = calibration_of()
    words = words_of(plots.calibration_ranks(found, "z"))
    assert "z[1]: too high" in words
    assert "z[0]" not in words
    assert "1 of 3 dims depart" in words
    figure = plots.calibration_ranks(found, "z")
    (line,) = [line for line in figure.axes[0].lines if line.get_label().startswith("z[1]")]
    share = float((found.ranks["z"][:, 1] < 50).double().mean())
    assert line.get_ydata()[49] == pytest.approx(share - 0.5)
    heights = [p.get_height() for p in figure.axes[1].patches if p.get_height() > 1]
    assert sum(heights) >= 500
    assert "0 of 3" in words_of(plots.calibration_ranks(calibration_of(bad=()), "z"))
    with pytest.raises(UsageError, match="expected one of"):
        plots.calibration_ranks(found, "y")


def test_differences_are_drawn_from_the_best():
    one = torch.ones(50).double()

    def of(log_px):
        return Estimate(log_px, 0.01 * one, 90 * one, 0.1 * one, log_px, 0 * one, 100, 0, 5, "binary", digest="a")

    base = torch.randn(50).double() - 80
    found = compare({"a": of(base), "b": of(base + 1 + 0.1 * torch.randn(50))})
    words = words_of(plots.differences(found))
    assert "minus that of b" in words
    assert f"−{-found.difference('a', 'b')[0]:.3f}" in words


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    x = (torch.rand(60, 6) < 0.5).float()
    vae = VAE(
        priors.StandardNormal(2), likelihoods.Bernoulli(nn.mlp(2, 6)), posteriors.DiagonalNormal(nn.mlp(6, 4))
    )  # fmt: skip
    return fit(vae.model, vae.guide, x, epochs=1, directory=tmp_path_factory.mktemp("run")), x


def of_results(run, x):
    return {part.key: part for part in results_sections(RunData(run, x, None, 0))}


def test_what_lies_in_the_folder_is_in_the_report_and_nothing_else(trained):
    run, x = trained
    folder = run.directory / "results"
    assert of_results(run, x) == {}
    gaps_of().save(folder, "gaps_train")
    gaps_of(0.9).save(folder, "gaps_test")
    representation_of().save(folder)
    calibration_of().save(folder)
    found = of_results(run, x)
    assert list(found) == ["gaps", "rate_distortion", "kl", "calibration"]
    assert all(part.content is not None for part in found.values())
    assert "; train: inference gap 1.5" in found["gaps"].content.caption
    assert "6 of 80 data" in found["gaps"].content.caption
    assert "between" in found["rate_distortion"].content.caption
    assert "the guide is not calibrated" in found["calibration"].content.caption
    titles = ["Inference gaps", "Rate and distortion", "Rate of each dim of z", "Calibration on simulated data of z"]
    assert [part.title for part in found.values()] == titles
    (folder / "calibration.npz").write_bytes(b"damaged")
    (folder / "gaps_test.npz").unlink()
    found = of_results(run, x)
    assert found["calibration"].content is None
    assert "not a saved Calibration" in found["calibration"].reason
    assert "not a saved Gaps" in found["gaps"].reason
    assert found["kl"].content is not None
