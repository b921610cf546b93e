"""The explorer of the report: its values, and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from ppvae import VAE, data, fit, generate, likelihoods, log_marginal, nn, posteriors, priors, report
from ppvae.errors import UsageError

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


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
    est = log_marginal(run.model, run.guide, test, num_particles=30)
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


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (380, "dark")])
def test_the_explorer_in_a_browser(page, width, scheme):
    """Pictures change with the pointer, the keyboard and the sliders; no error; nothing wider than the page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    *_, path = page
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        errors: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda e: errors.append(str(e)))
        tab.on("request", lambda r: requests.append(r.url))
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
        still = picture("varied")
        tab.locator("#explorer-app input[type=range]").first.focus()
        for _ in range(40):
            tab.keyboard.press("ArrowRight")
        assert picture("varied") != still
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert errors == []
        assert {url.split(":")[0] for url in requests} <= {"file", "data"}
        browser.close()
