"""The explorer of the report: its values, and the page in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import (
    VAE,
    data,
    fit,
    generate,
    inference,
    likelihoods,
    log_marginal,
    nn,
    posteriors,
    priors,
    report,
    training,
)
from ppvae.errors import UsageError
from ppvae.inference import SVI
from ppvae.objectives import ELBO
from ppvae.report.decoder import decoder_numbers

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]

LABELS = """
window.drawnLabels = [];
const fillText = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const t = this.getTransform(), wide = this.measureText(text).width * t.a;
  const left = t.a * x + t.e - wide * {left: 0, start: 0, center: 0.5, right: 1, end: 1}[this.textAlign];
  if (t.b === 0) window.drawnLabels.push([text, left, left + wide, this.canvas.width]);
  return fillText.call(this, text, x, y);
};
"""  # records each label that is not rotated, and where it begins and ends in its canvas


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(run, data, the path of the report)."""
    train, _, test = data.load("digits", binarize="fixed")
    torch.manual_seed(0)
    vae = VAE(
        prior=priors.StandardNormal(3),
        likelihood=likelihoods.Bernoulli(nn.mlp(3, 64, hidden=(32,))),
        posterior=posteriors.DiagonalNormal(nn.mlp(64, 6, hidden=(32,))),
    )
    run = fit(vae.model, vae.guide, train, epochs=3, directory=tmp_path_factory.mktemp("run"))
    est = log_marginal(run.model, run.guide, test, num_particles=30, proposal="guide")
    return run, test, est, report.write(run, data=test, estimate=est)


def content(path) -> dict:
    found = re.search(r'id="explorer-data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(found[1].replace("<\\/", "</"))


def test_the_values_are_those_of_the_run(page):
    run, test, est, path = page
    held = content(path)
    rows = torch.tensor(held["rows"])
    means = generate.posterior_means(run.model, run.guide, test)["z"]
    dims = [d["dim"] for d in held["dims"]]
    assert torch.allclose(torch.tensor(held["z"]), means[rows][:, dims], atol=1e-3)
    assert torch.allclose(torch.tensor(held["logPx"]).double(), est.log_px[rows].double(), atol=0.01)
    distances = torch.cdist(means[rows], means[rows]).fill_diagonal_(torch.inf)
    assert held["near"][0][0] == int(distances[0].argmin())
    assert path.stat().st_size < 5e6


def test_decoding_given_values_is_the_likelihoods_mean(page):
    run, test, *_ = page
    z = torch.randn(4, 3)
    found = generate.decode(run.model, run.guide, test[:5], z)
    means = generate.posterior_means(run.model, run.guide, test[:5])["z"]
    again = generate.decode(run.model, run.guide, test[:5], means, rows=torch.arange(5))
    assert found.shape == (4, 64)
    assert not torch.allclose(found[0], found[1])
    assert torch.allclose(again[:1], generate.decode(run.model, run.guide, test[:5], means[:1]), atol=1e-6)
    with pytest.raises(UsageError, match=r"values: expected \[M, 3\], found \[4, 2\]"):
        generate.decode(run.model, run.guide, test[:5], z[:, :2])
    with pytest.raises(UsageError, match="rows: expected 4 numbers below 5"):
        generate.decode(run.model, run.guide, test[:5], z, rows=torch.tensor([0, 1, 2, 5]))


def decoded(held: dict, z: torch.Tensor) -> torch.Tensor:
    """What the page computes from z, by the numbers in it."""
    functions = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda v: v}
    out = z.double()
    for layer in held["decoder"]["layers"]:
        if isinstance(layer, str):
            out = functions[layer](out)
            continue
        rows, columns = layer["shape"]
        codes = torch.tensor(np.frombuffer(base64.b64decode(layer["values"]), "<i2").astype(float))
        weight, bias = codes[: rows * columns].reshape(rows, columns), codes[rows * columns :]
        out = out @ (weight * layer["units"][0]).T + bias * layer["units"][1]
    return functions[held["decoder"]["link"]](out[:, : held["decoder"]["outputs"]])


def test_the_decoder_in_the_page_is_the_likelihoods_mean(page):
    """At any z, within a step of 256 levels, and the page holds no grids of single dims."""
    run, test, _, path = page
    held = content(path)
    z = 2 * torch.randn(50, 3)
    expected = generate.decode(run.model, run.guide, test[:1], z)
    assert (decoded(held, z) - expected).abs().max() < 1 / 255
    assert torch.allclose(
        torch.tensor(held["decoder"]["z"])[:, [d["dim"] for d in held["dims"]]], torch.tensor(held["z"])
    )


@pytest.mark.parametrize(
    ("likelihood", "link"),
    [
        (lambda: likelihoods.Normal(nn.mlp(2, 6, hidden=(8,)), scale=0.1), "identity"),
        (lambda: likelihoods.Normal(nn.mlp(2, 12, hidden=(8,), activation=torch.nn.ELU), scale="network"), "identity"),
        (lambda: likelihoods.Bernoulli(nn.mlp(2, 6, hidden=(8,), activation=torch.nn.ReLU)), "sigmoid"),
        (lambda: likelihoods.Normal(nn.gated_mlp(2, 6, hidden=(8,)), scale=0.1), None),
        (lambda: likelihoods.Normal(nn.mlp(2, 6, activation=lambda: torch.nn.ELU(0.5)), scale=0.1), None),
        (lambda: likelihoods.Poisson(nn.mlp(2, 6, hidden=(8,))), "exp"),
    ],
)
def test_decoders_of_known_layers_are_found(likelihood, link):
    torch.manual_seed(0)
    vae = VAE(priors.StandardNormal(2), likelihood(), posteriors.DiagonalNormal(nn.mlp(6, 4, hidden=(8,))))
    x = torch.rand(40, 6).round()
    z = torch.randn(20, 2)
    found = decoder_numbers(lambda z: generate.decode(vae.model, vae.guide, x, z), z)
    assert (found and found["link"]) == link


def test_a_decoder_of_more_than_the_latent_is_none():
    """A mean that depends on the datum beside z is no function of z alone."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z) + x.mean(1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    net = torch.nn.Sequential(torch.nn.Linear(2, 3)).requires_grad_(False)
    x, z = torch.randn(20, 3), torch.randn(20, 2)
    assert decoder_numbers(lambda z: generate.decode(model, guide, x, z, rows=torch.arange(20)), z) is None


@pytest.fixture(scope="module")
def sequence_page(tmp_path_factory):
    """The report of a pair of sequences whose decoder is a recurrent network."""

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = torch.nn.GRU(3, 12, batch_first=True), torch.nn.Linear(12, 2)

        def forward(self, z):
            lead = z.shape[:-1]
            steps = z.reshape(-1, 1, 3).expand(-1, 10, 3)
            return self.out(self.rnn(steps)[0]).reshape(*lead, 10, 2)

    torch.manual_seed(0)
    time = torch.linspace(0, 6, 10)
    phase = 6 * torch.rand(120, 1)
    x = torch.stack([torch.sin(time + phase), torch.cos(2 * time + phase)], -1) + 0.1 * torch.randn(120, 10, 2)
    encoder = torch.nn.Sequential(torch.nn.Flatten(1), nn.mlp(20, 6, hidden=(16,)))
    vae = VAE(priors.StandardNormal(3), likelihoods.Normal(Decoder(), scale=0.2), posteriors.DiagonalNormal(encoder))
    run = fit(vae.model, vae.guide, x, epochs=3, directory=tmp_path_factory.mktemp("sequences"))
    return report.write(run, data=x)


@pytest.fixture(scope="module")
def table_page(tmp_path_factory):
    """The report of a pair of a data frame, whose columns have names and units of their own."""
    torch.manual_seed(0)
    u = torch.randn(120, 2)
    columns = torch.stack([u[:, 0], 10 + 3 * u[:, 1], u.sum(1), u[:, 0] - u[:, 1]], -1) + 0.1 * torch.randn(120, 4)
    frame = pd.DataFrame(columns.numpy(), columns=["age", "income", "weight", "height"])
    vae = VAE(
        priors.StandardNormal(3),
        likelihoods.Normal(nn.mlp(3, 4, hidden=(16,)), scale=0.2),
        posteriors.DiagonalNormal(nn.mlp(4, 6, hidden=(16,))),
    )
    run = fit(vae.model, vae.guide, frame, epochs=3, directory=tmp_path_factory.mktemp("table"))
    return report.write(run, data=frame)


def test_columns_of_a_table_are_named(table_page):
    held = content(table_page)
    assert held["kind"] == "curve"
    assert held["names"] == ["age", "income", "weight", "height"]
    assert held["decoder"] is not None


def test_sequences_move_one_dim_at_a_time(sequence_page):
    held = content(sequence_page)
    assert held["decoder"] is None
    assert held["kind"] == "curve"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "sequences", "table"])
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (380, "dark")])
def test_the_explorer_in_a_browser(page, sequence_page, table_page, width, scheme, kind):
    """Pictures change with the pointer, the keyboard and the sliders; no error; nothing wider than the page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    path = {"images": page[-1], "sequences": sequence_page, "table": table_page}[kind]
    held = content(path)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        errors: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda e: errors.append(str(e)))
        tab.on("request", lambda r: requests.append(r.url))
        tab.add_init_script(LABELS)
        tab.goto(path.as_uri())
        tab.wait_for_selector("#explorer-app[data-ready]")

        def picture(name: str) -> str:
            tab.wait_for_timeout(80)
            return tab.evaluate(f"document.getElementById('explorer-{name}').toDataURL()")

        tab.locator("#explorer-map").scroll_into_view_if_needed()
        box = tab.locator("#explorer-map").bounding_box()
        seen = []
        for share in (0.2, 0.5, 0.8):
            tab.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
            seen.append(picture("now"))
        tab.locator("#explorer-map").focus()
        for _ in range(8):
            tab.keyboard.press("ArrowUp")
        seen.append(picture("now"))
        assert len(set(seen)) == 4
        before = picture("own"), picture("reconstruction")
        tab.keyboard.press("n")
        assert picture("own") != before[0]

        sliders = tab.locator("#explorer-app input[type=range]")
        seen = [picture("varied")]
        for i in (0, 1):
            sliders.nth(i).focus()
            for _ in range(40):
                tab.keyboard.press("ArrowRight")
            seen.append(picture("varied"))
        assert len(set(seen)) == 3
        title = tab.locator("#explorer-dims-title").inner_text()
        values = [float(sliders.nth(i).input_value()) for i in (0, 1)]
        chosen = next(i for i, row in enumerate(held["rows"]) if f"#{row}" in title.replace(":", " ").split())
        moved = [abs(v - held["z"][chosen][i]) > 0.05 for i, v in enumerate(values)]
        assert moved == ([False, True] if kind == "sequences" else [True, True])  # together, or one at a time
        assert ("one dim" in title.lower()) == (kind == "sequences")
        if kind == "images":
            z = torch.tensor(held["decoder"]["z"][chosen])
            z[[d["dim"] for d in held["dims"][:2]]] = torch.tensor(values)
            shown = tab.evaluate(
                "(() => { const c = document.getElementById('explorer-varied');"
                " return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
            )
            expected = 255 * decoded(held, z[None])[0]
            assert (torch.tensor(shown).reshape(-1, 4)[:, 0] - expected).abs().max() <= 1
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        labels = tab.evaluate("window.drawnLabels")
        assert kind == "images" or {t for t, *_ in labels} >= set(held["names"] or ["0", "9"])
        assert [t for t, left, right, edge in labels if left < 0 or right > edge] == []
        assert errors == []
        assert {url.split(":")[0] for url in requests} <= {"file", "data"}
        browser.close()


def test_numbers_of_one_column_each_have_an_explorer(tmp_path):
    """A pair of named columns has no event dims."""
    decoder, encoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 4)

    def model(age, income):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(age)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = decoder(z)
            pyro.sample("age", dist.Normal(loc[..., 0], 1.0), obs=age)
            pyro.sample("income", dist.Normal(loc[..., 1], 1.0), obs=income)

    def guide(age, income):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(age)):
            loc, log_scale = encoder(torch.stack([age, income], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    columns = {"age": torch.randn(40), "income": torch.randn(40)}
    run = fit(model, guide, columns, epochs=1)
    held = content(report.write(run, data=columns, directory=tmp_path))
    assert len(held["rows"]) == 40


def test_a_report_of_a_pair_trained_by_hand(tmp_path):
    vae = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(nn.mlp(2, 6)), posteriors.DiagonalNormal(nn.mlp(6, 4)))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), ELBO())
    x = (torch.rand(20, 6) > 0.5).float()
    svi.step(x)
    with pytest.raises(UsageError, match=r"expected the result of fit or load, found tuple") as raised:
        report.write((vae.model, vae.guide), data=x, directory=tmp_path)
    call = str(raised.value).split("by hand: ")[1]
    run = eval(call, {"training": training, "inference": inference, "model": vae.model, "guide": vae.guide})
    assert report.write(run, data=x, directory=tmp_path).exists()
