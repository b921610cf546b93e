"""The report and its pictures: self-contained, complete, and right in what can be counted."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from PIL import Image

from ppvae import VAE, data, fit, likelihoods, log_marginal, nn, plots, posteriors, priors, report
from ppvae.errors import UsageError
from ppvae.evaluation import annealed
from ppvae.evaluation.estimate import Estimate
from ppvae.models import LinearGaussian
from ppvae.report.contents import all_sections
from ppvae.report.estimate_section import least_reliable_data
from ppvae.report.header import facts, page_header, remarks
from ppvae.report.html import render_page
from ppvae.report.run_data import RunData, image_shape
from ppvae.report.section import Section

TITLES = (
    "Explorer", "Training", "Samples", "Reconstructions", "Interpolations", "Traversals of z", "Latent map of z",
    "Distribution of log p(x)", "Bound by number of particles", "Reliability of each log p(x)",
    "Data with the largest k̂", "Configuration",
)  # fmt: skip


def small_vae(latent=3):
    torch.manual_seed(0)
    return VAE(
        prior=priors.StandardNormal(latent),
        likelihood=likelihoods.Bernoulli(nn.mlp(latent, 64, hidden=(32,))),
        posterior=posteriors.DiagonalNormal(nn.mlp(64, 2 * latent, hidden=(32,))),
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(run, test data, estimate, the written page's path)."""
    train, valid, test = data.load("digits", binarize="fixed")
    vae = small_vae()
    folder = tmp_path_factory.mktemp("run")
    run = fit(vae.model, vae.guide, train, valid=valid, epochs=2, directory=folder)
    est = log_marginal(run.model, run.guide, test, num_particles=50, proposal="guide")
    return run, test, est, report.write(run, data=test, estimate=est)


def constructed(n=40, particles=1000, **changed):
    """An estimate made by hand, with whatever is changed in it."""
    generator = torch.Generator().manual_seed(0)
    log_px = torch.randn(n, generator=generator, dtype=torch.float64) * 5 - 90
    values = {
        "log_px": log_px,
        "std_error": torch.full_like(log_px, 0.1),
        "ess": torch.rand(n, generator=generator, dtype=torch.float64) * (particles - 1) + 1,
        "k_hat": torch.linspace(-0.2, 1.2, n, dtype=torch.float64),
        "elbo": log_px - 2,
        "nonfinite": torch.zeros(n, dtype=torch.long),
        "bounds": {1: log_px - 2, 10: log_px - 0.5, particles: log_px},
    }
    return Estimate(
        **{**values, **changed}, num_particles=particles, seed=0, dims=64, base_measure="binary", data="made by hand"
    )  # fmt: skip


def without_pictures(text):
    text = re.sub(r'"data:image/png;base64,[A-Za-z0-9+/=]*"', '"DATA"', text)
    return re.sub(r'"(sprite|values)":"[A-Za-z0-9+/=]*"', r'"\1":"DATA"', text)


class Tags(HTMLParser):
    """Notes every attribute, and that every tag that is opened is closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def texts(figure):
    return " ".join(t.get_text() for ax in figure.axes for t in (*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label))


def draws(figure):
    """Whether the figure can be drawn, in few pixels, which is quicker."""
    figure.set_dpi(30)
    return plots.to_png(figure).startswith(b"\x89PNG")


def pixels(figure):
    return np.asarray(Image.open(io.BytesIO(plots.to_png(figure))).convert("RGB"))


# --- the page ---


def test_one_file_that_needs_no_other(digits):
    *_, path = digits
    text = path.read_text(encoding="utf-8")
    tags = Tags(text)
    bare = without_pictures(text)
    assert re.findall(r"<script[^>]*>", bare) == ['<script type="application/json" id="explorer-data">', "<script>"]
    for word in ("http", "//", "<script src", "url(", "@import", "<link", "Traceback"):
        assert word not in bare
    sources = [value for _, name, value in tags.attributes if name == "src"]
    assert len(sources) == 10
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    links = {value for _, name, value in tags.attributes if name == "href"}
    assert links <= {f"#{value}" for _, name, value in tags.attributes if name == "id"}


def test_every_section_is_there_and_drawn(digits):
    *_, path = digits
    bare = without_pictures(path.read_text(encoding="utf-8"))
    assert tuple(re.findall(r"<h2>(.*?)</h2>", bare)) == TITLES
    assert "Not available" not in bare
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", bare)
    assert [len(re.findall(r"\bLook for\b", caption)) for caption in captions] == [1] * 10


def test_pictures_are_the_ones_in_the_page(digits):
    *_, path = digits
    inlined = [base64.b64decode(t) for t in re.findall(r"base64,([A-Za-z0-9+/=]*)", path.read_text(encoding="utf-8"))]
    files = sorted((path.parent / "pictures").iterdir())
    assert {f.suffix for f in files} == {".png"}
    assert {f.read_bytes() for f in files} == set(inlined)
    assert not list(path.parent.rglob("*.tmp"))


def test_headline(digits):
    run, test, est, path = digits
    bare = without_pictures(path.read_text(encoding="utf-8"))
    bad = int((~est.reliable).sum())
    for words in (
        f"{est.nll:.3f}", f"± {est.nll_std_error:.3f}", f"{est.bits_per_dim:.3f}", "binary", f"−{-est.elbo.mean():.3f}",
        f">{bad} <small>of {len(test)}", "K = 50", est.digest[:12], run.config["fit"]["digest"][:12],
        "VAE on digits/test", "likelihood Bernoulli", "seed 0", "torch " + torch.__version__,
    ):  # fmt: skip
        assert words in bare


def test_written_again_it_is_the_same(digits, tmp_path):
    run, test, est, path = digits
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = report.write(run, data=test, estimate=est, directory=tmp_path)
    assert again.read_bytes() == path.read_bytes()
    assert torch.equal(torch.get_rng_state(), before)


def test_words_are_escaped(digits):
    run, test, *_ = digits
    bad = "<script>alert('&')</script>"
    named = type(run)(run.model, run.guide, run.history, None, {**run.config, "pair": {"name": bad}, "note": bad})
    run_data = RunData(named, test[:5], None, 0)
    text = render_page(page_header(run_data), [(Section(bad, bad, reason=bad), None)], {bad: bad})
    Tags(text)
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(") >= 8


def test_a_folder_is_needed(digits):
    run, test, *_ = digits
    homeless = type(run)(run.model, run.guide, run.history, None, {})
    with pytest.raises(UsageError, match="directory: expected a folder"):
        report.write(homeless, data=test)


def test_labels_must_be_one_for_each_datum(digits, tmp_path):
    run, test, *_ = digits
    with pytest.raises(UsageError, match="labels: expected one for each of 360"):
        report.write(run, data=test, directory=tmp_path, labels=[0, 1])


def test_an_estimate_of_other_data_is_told(digits):
    run, test, est, _ = digits
    run_data = RunData(run, test[:50], est, 0)
    parts = {part.key: part for part in all_sections(run_data)}
    assert parts["worst"].content is None
    assert parts["worst"].reason.startswith(f"The estimate is of other data (SHA-256 {est.digest[:12]})")
    assert remarks(run_data)[-1] == parts["worst"].reason


def test_stale_pictures_go(digits, tmp_path):
    run, test, *_ = digits
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "worst.png").write_bytes(b"old")
    made = report.pictures(run, data=test[:5], directory=tmp_path)
    assert {"curves", "samples", "reconstructions", "interpolations", "traversals", "latent_map"} == set(made)
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {p.name for p in made.values()}


# --- the data with the worst k_hat ---


def test_worst_first():
    k_hat = torch.tensor([0.1, 0.9, -math.inf, math.inf, 0.9, math.nan, 0.3], dtype=torch.float64)
    ess = torch.tensor([500.0, 80, 1000, 2, 20, 5, 400], dtype=torch.float64)
    nonfinite = torch.tensor([0, 0, 0, 0, 0, 0, 3])
    est = constructed(7, k_hat=k_hat, ess=ess, nonfinite=nonfinite)
    assert report.least_reliable(est, 7) == [6, 3, 5, 4, 1, 0, 2]
    assert report.least_reliable(est, 2) == [6, 3]


def test_worst_rows_are_shown_with_their_numbers(digits):
    run, test, est, _ = digits
    rows = report.least_reliable(est, 16)
    assert rows[0] == int(est.k_hat.argmax())
    assert sorted(est.k_hat.tolist(), reverse=True)[:16] == [float(est.k_hat[i]) for i in rows]
    figure = least_reliable_data(RunData(run, test, est, 0)).figure
    words = texts(figure)
    assert [int(i) for i in re.findall(r"#(\d+)", words)] == rows
    assert f"#{rows[0]}, label {int(test.labels[rows[0]])} k̂ {float(est.k_hat[rows[0]]):.2f} ESS" in words
    image = figure.axes[0].get_images()[0].get_array()  # the first image is the worst datum, pixel by pixel
    scale = 190 // 8
    shown = np.asarray(image)[scale // 2 : 8 * scale : scale, scale // 2 : 8 * scale : scale, 0]
    np.testing.assert_array_equal(shown, test[rows[0]].reshape(8, 8))


def test_dynamic_data_are_shown_as_they_were_evaluated():
    train, _, _ = data.load("digits", binarize="dynamic")
    est = constructed(len(train), digest=train.fixed(3).digest)
    est = type(est)(**{**vars(est), "seed": 3})
    run = fit(*pair_of(small_vae()), train[:100], epochs=1)
    run_data = RunData(run, train, est, seed=0)
    assert not run_data.mismatch
    assert torch.equal(run_data.values(torch.arange(5)), train.fixed(3)[:5].as_subclass(torch.Tensor))


# --- other pairs ---


def pair_of(vae):
    return vae.model, vae.guide


def test_data_that_are_no_images():
    torch.manual_seed(0)
    x = torch.randn(120, 5)
    pair = LinearGaussian(5, 2)
    run = fit(pair.model, pair.mean_field, x, epochs=1)
    est = log_marginal(run.model, run.guide, x, num_particles=30, proposal="guide")
    parts = {part.key: part.content or part.markup for part in all_sections(RunData(run, x, est, 0))}
    assert len(parts) == 11
    assert '"kind":"curve"' in parts["explorer"]
    assert all(parts.values())
    assert "a line over the dims of x" in parts["samples"].caption
    assert "Look for regions of low log p(x)" in parts["latent_map"].caption  # no labels: coloured by log p(x)
    assert draws(parts["worst"].figure)


def plain(latents):
    """A pair of plain functions on [N, 6]: a point mass, two levels, an enumerated latent, or one shared by all."""
    net, back = torch.nn.Linear(6, 2), torch.nn.Linear(2, 6)

    def model(x):
        pyro.module("back", back)
        if latents == "shared":
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            if latents == "enumerated":
                c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
                w = torch.eye(2)[c]
            if latents in ("point", "levels"):
                w = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if latents == "levels":
                w = pyro.sample("y", dist.Normal(w, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(back(w), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        if latents == "shared":
            pyro.sample("w", dist.Normal(net(x).mean(0), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            if latents == "point":
                pyro.sample("z", dist.Delta(net(x)).to_event(1))
            if latents == "levels":
                pyro.sample("y", dist.Normal(net(x), 1.0).to_event(1))
                pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            if latents == "enumerated":
                net(x)

    return model, guide


@pytest.mark.parametrize(
    ("latents", "drawn", "words"),
    [
        ("point", {"latent_map", "traversals"}, "There is no estimate of log p(x)"),
        ("levels", {"latent_map", "latent_map_2", "traversals", "traversals_2"}, "y: 2 of 2 dims; z: 0 of 2 dims"),
        ("enumerated", {"samples"}, "No latent is a vector of real numbers per datum."),
        ("shared", {"samples"}, "Weights are joint over the data set"),
    ],
)
def test_what_a_pair_does_not_allow_is_left_out_with_a_sentence(latents, drawn, words):
    torch.manual_seed(0)
    x = torch.randn(30, 6)
    objective = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1) if latents == "enumerated" else None
    run = fit(*plain(latents), x, epochs=1, objective=objective)
    est = None if latents == "point" else log_marginal(run.model, run.guide, x, num_particles=30, proposal="guide")
    run_data = RunData(run, x, est, 0)
    parts = list(all_sections(run_data))
    assert words in " ".join([*(part.reason for part in parts), *(text for _, text in facts(run_data))])
    assert drawn | {"curves"} <= {part.key for part in parts if part.content}
    assert any("Delta (point mass)" in r for r in remarks(run_data)) == (latents == "point")


def test_a_pair_that_draws_its_own_subsample_is_called_with_all_data():
    torch.manual_seed(0)
    x, net = torch.randn(60, 6), torch.nn.Linear(6, 2)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=24) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.repeat(1, 3), 1.0).to_event(1), obs=x[i])

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x), subsample_size=24) as i:
            pyro.sample("z", dist.Normal(net(x[i]), 1.0).to_event(1))

    run = fit(model, guide, x, epochs=1)
    run_data = RunData(run, x, None, 0)
    assert run_data.needs_all_data
    made = {part.key for part in all_sections(run_data) if part.content}
    assert {"samples", "reconstructions", "interpolations", "traversals", "latent_map"} <= made
    torch.testing.assert_close(run_data.means["z"], net(x))  # in the data's order


def test_a_pair_with_labels():
    train, _, test = data.load("digits", binarize="fixed")
    torch.manual_seed(0)
    back, net = torch.nn.Linear(12, 64), torch.nn.Linear(74, 2)

    def coded(y):
        return torch.nn.functional.one_hot(y, 10).float()

    def model(x, y):
        pyro.module("back", back)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            both = torch.cat([z, coded(y).expand(*z.shape[:-1], 10)], -1)
            pyro.sample("x", dist.Bernoulli(logits=back(both)).to_event(1), obs=x)

    def guide(x, y):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(torch.cat([x, coded(y)], -1)), 1.0).to_event(1))

    run = fit(model, guide, (train, train.labels), epochs=1)
    test = test[:60]
    est = log_marginal(run.model, run.guide, (test, test.labels), num_particles=30, proposal="guide")
    run_data = RunData(run, (test, test.labels), est, 0)
    assert run_data.digest == est.digest
    assert torch.equal(run_data.labels, test.labels)
    parts = {part.key: part.content or part.markup for part in all_sections(run_data)}
    assert all(parts.values())
    assert "each conditioned on the other columns of one of the first data" in parts["samples"].caption


def test_generated_arrays_and_pictures(digits, tmp_path):
    run, test, *_ = digits
    paths = report.write_generated(run, test, tmp_path, count=5)
    shapes = {p.stem: np.load(p).shape for p in paths if p.suffix == ".npy"}
    assert shapes == {
        "samples": (5, 64), "reconstructions": (5, 64), "interpolations": (6, 10, 64), "traversals": (3, 7, 64),
    }  # fmt: skip
    assert sorted(p.name for p in paths) == sorted(p.name for p in (tmp_path / "generated").iterdir())


@pytest.mark.parametrize(
    ("event", "unit", "expected"),
    [
        ((1, 8, 8), True, ((1, 8, 8), False)),
        ((3, 4, 6), False, ((3, 4, 6), False)),
        ((784,), True, ((1, 28, 28), True)),
        ((784,), False, (None, False)),
        ((49,), True, (None, False)),
        ((65,), True, (None, False)),
        ((28, 28), True, ((1, 28, 28), True)),
        ((4, 8, 8), True, (None, False)),
        ((), True, (None, False)),
    ],
)
def test_what_is_taken_for_an_image(event, unit, expected):
    assert image_shape(event, unit) == expected


# --- plots ---


HARD = [
    {},
    {"k_hat": torch.full((40,), -math.inf).double(), "ess": torch.full((40,), 1000.0).double()},
    {"k_hat": torch.full((40,), math.nan).double()},
    {"k_hat": torch.tensor([-math.inf, math.inf, math.nan, 0.5] * 10).double()},
    {
        "log_px": torch.tensor([-math.inf, math.nan, -90.0, -95.0] * 10).double(),
        "ess": torch.full((40,), math.nan).double(),
    },
    {"log_px": torch.full((40,), -math.inf).double()},
    {"log_px": torch.full((40,), -3.0).double()},
]


@pytest.mark.parametrize("changed", HARD)
def test_hard_estimates_are_drawn(changed):
    est = constructed(**changed)
    for draw in (plots.log_px_histogram, plots.bound_curve, plots.diagnosis):
        assert draws(draw(est))


def test_diagnosis_puts_infinite_k_hat_at_the_edges():
    k_hat = torch.tensor([-math.inf, 0.2, 0.9, math.inf, math.nan], dtype=torch.float64)
    est = constructed(5, k_hat=k_hat, ess=torch.full((5,), 400.0).double())
    ax = plots.diagnosis(est).axes[0]
    points = {c.get_label(): sorted(c.get_offsets()[:, 0].tolist()) for c in ax.collections}
    assert points["reliable"][1:] == [0.2]
    assert points["not reliable"][:1] == [0.9]
    assert points["reliable"][0] < 0 < 0.9 < points["not reliable"][1]
    labels = dict(zip(ax.get_xticks().tolist(), [t.get_text() for t in ax.get_xticklabels()], strict=True))
    assert labels[points["reliable"][0]] == "−∞"
    assert labels[points["not reliable"][1]] == "∞"
    assert "1 datum with no finite value not shown" in plots.notes(ax.figure)
    assert "1 datum with no finite value not shown" not in texts(ax.figure)


def test_bound_curve_shows_the_mean_over_data_that_are_finite_at_every_k():
    est = constructed(3, particles=100)
    bounds = {1: [-5.0, -6.0, -math.inf], 10: [-4.0, -5.0, -7.0], 100: [-3.0, -4.5, -6.0]}
    est = constructed(3, particles=100, bounds={k: torch.tensor(v).double() for k, v in bounds.items()})
    figure = plots.bound_curve(est)
    line = next(line for line in figure.axes[0].lines if line.get_label() == "mean $L_k$")
    assert line.get_xdata().tolist() == [1, 10, 100]
    assert line.get_ydata().tolist() == [-5.5, -4.5, -3.75]
    assert "1 datum with a bound that is not finite not shown" in plots.notes(figure)
    assert "1 datum with a bound that is not finite not shown" not in texts(figure)


def test_histogram_counts_every_finite_datum_once():
    est = constructed(40, log_px=torch.cat([torch.linspace(-99, -60, 39).double(), torch.tensor([-math.inf]).double()]))
    figure = plots.log_px_histogram(est)
    heights = [sum(p.get_height() for p in bars) for bars in figure.axes[0].containers]
    good = int((est.reliable & est.log_px.isfinite()).sum())
    assert heights == [good, 39 - good]
    assert "1 datum with no finite log p(x) not shown" in plots.notes(figure)
    assert "1 datum with no finite log p(x) not shown" not in texts(figure)


def test_curves_show_the_history():
    history = [
        {"epoch": e, "loss": 100.0 / e, "valid_elbo": -90.0 / e, "valid_rate": 0.1 * e, "valid_distortion": 90.0 / e}
        for e in range(1, 41)
    ]
    figure = plots.curves(history)
    lines = {line.get_label(): line.get_ydata() for ax in figure.axes for line in ax.lines}
    np.testing.assert_allclose(lines["loss (training objective)"], [m["loss"] for m in history])
    np.testing.assert_allclose(lines["−ELBO (validation data)"], [-m["valid_elbo"] for m in history])
    np.testing.assert_allclose(lines["rate (validation data)"], [m["valid_rate"] for m in history])
    assert "the first 2 epochs beyond the axis" in plots.notes(figure)
    assert "the first 2 epochs beyond the axis" not in texts(figure)
    assert draws(plots.curves([{"epoch": 1, "loss": 3.0}]))
    assert draws(plots.curves([{"epoch": 1, "loss": math.nan}, {"epoch": 2, "loss": 1.0, "train_elbo": -2.0}]))
    with pytest.raises(UsageError, match="at least one epoch"):
        plots.curves([])


@pytest.mark.parametrize("labels", [None, torch.arange(200) % 3, torch.arange(200) % 15, torch.arange(200)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_latent_map(labels, dims):
    torch.manual_seed(0)
    figure = plots.latent_map(torch.randn(200, dims), labels, log_px=torch.randn(200), names=("zero", "one", "two"))
    assert draws(figure)
    shown = sum(len(c.get_offsets()) for c in figure.axes[0].collections)
    assert shown == 200
    assert ("one" in texts(figure).split()) == (labels is not None and len(labels.unique()) <= 20)


def test_latent_map_says_how_much_of_the_variance_it_shows():
    means = torch.tensor([[3.0, 0, 0, 7], [-3, 0, 0, 7], [0, 1, 0, 7], [0, -1, 0, 7]])
    words = texts(plots.latent_map(means, site="code"))
    assert "principal component 1 of the means of code (90 % of variance)" in words
    assert "principal component 2 of the means of code (10 % of variance)" in words


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_image_grid_pixel_by_pixel(shape):
    images = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0, 2.0], [-1.0, 0.0, math.nan, 0.0, 0.0, 0.0], [math.nan] * 6])
    drawn = pixels(plots.image_grid(images.reshape(-1, *shape), (1, 2, 3), cols=3))
    scale = 144 // 3
    assert drawn.shape == (2 * scale, 3 * 144 + 2 * 4, 3)
    centres = drawn[scale // 2 :: scale, scale // 2 :: scale]
    np.testing.assert_allclose(centres[:, :3, 0].ravel(), [0, 64, 128, 191, 255, 255], atol=1)
    assert (drawn[:, 144:148] == 255).all()  # the gap
    assert drawn[10, 148 + 2 * scale + 10].tolist() == [0xD5, 0x5E, 0x00]  # NaN
    assert (drawn[:, -144:] == 255).all()  # an image that is missing


def test_image_grid_in_colour_and_with_words():
    images = torch.zeros(2, 3, 3, 4, 4)
    images[0, 1, 0] = 5.0
    figure = plots.image_grid(
        images, (3, 4, 4), limits=(-5.0, 5.0), row_titles=["a", "b"], col_titles=["1", "2", "3"], titles=["t"] * 6
    )
    assert texts(figure).split() == ["t"] * 6 + ["a", "b", "1", "2", "3"]
    colours = {
        tuple(c) for c in pixels(plots.image_grid(images, (3, 4, 4), limits=(-5.0, 5.0))).reshape(-1, 3).tolist()
    }
    assert colours <= {(255, 255, 255), (127, 127, 127), (128, 128, 128), (255, 127, 127), (255, 128, 128)}
    with pytest.raises(UsageError, match="event_shape"):
        plots.image_grid(images, (2, 4, 4))
    with pytest.raises(UsageError, match="images"):
        plots.image_grid(images, (3, 5, 5))


@pytest.mark.parametrize("dims", [1, 2, 5, 40])
def test_parallel_coordinates(dims):
    torch.manual_seed(0)
    panels = {f"#{i}": {"data": torch.randn(dims), "samples": torch.randn(20, dims)} for i in range(5)}
    figure = plots.parallel_coordinates(panels)
    assert draws(figure)
    assert [ax.get_title(loc="left") for ax in figure.axes if ax.axison] == [f"#{i}" for i in range(5)]
    assert all(len(ax.lines) == 21 for ax in figure.axes if ax.axison)


def test_plots_leave_no_setting_behind():
    before = dict(matplotlib.rcParams)
    plots.to_png(plots.log_px_histogram(constructed()))
    assert dict(matplotlib.rcParams) == before


def test_an_annealed_estimate_is_judged_by_its_chains(digits, tmp_path):
    run, test, _, _ = digits
    est = annealed(run.model, run.guide, test, num_chains=2, num_temperatures=3, num_leapfrog=1)
    text = without_pictures(report.write(run, data=test, estimate=est, directory=tmp_path).read_text())
    assert "annealed importance sampling with 2 chains" in text
    assert "particles to judge" not in text
    assert "is judged by its chains" in text
    assert "importance sampling with K" not in text


def test_remarks_are_marked_as_warnings_only_where_there_is_one():
    torch.manual_seed(0)
    pair, x = LinearGaussian(3, 2), torch.randn(30, 3)
    run = fit(pair.model, pair.guide, x, epochs=1, compile=False)
    for particles, alarm in ((500, False), (20, True)):  # 20 are too few for a verdict
        est = log_marginal(run.model, run.guide, x, num_particles=particles, proposal="guide")
        assert bool(est.reliable.all()) is not alarm
        header = page_header(RunData(run, x, est, 0))
        assert header.alarm is alarm
        assert ('class="remark note">Verdict: reliable' in render_page(header, [], {})) is not alarm
