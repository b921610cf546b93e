"""Comparisons of log p(x): paired differences by hand, what is refused, and what is warned of."""

import dataclasses
import math

import pyro
import pytest
import torch

from ppvae import log_marginal
from ppvae.errors import CheckpointError, UsageError
from ppvae.evaluation.compare import Comparison, compare
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.quadrature import quadrature
from ppvae.evaluation.results import load_estimate
from ppvae.models import LinearGaussian


@pytest.fixture(autouse=True)
def clean():
    """float64 and an empty param store, and both as they were afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(before)


def estimate(log_px, base="binary", digest="abc", particles=100, bad=0, **words):
    one = torch.ones_like(log_px)
    k_hat = 0.1 * one
    k_hat[:bad] = 2.0
    return Estimate(
        log_px, 0.01 * one, 90 * one, k_hat, log_px - 1, 0 * one, particles, 0, 5, base, digest=digest, **words
    )  # fmt: skip


def test_the_difference_is_paired():
    common, own = 10 * torch.randn(200), 0.1 * torch.randn(200)
    found = compare({"low": estimate(common - 0.1 + own), "high": estimate(common)})
    assert found.names == ("high", "low")
    delta, error = found.difference("low", "high")
    assert delta == pytest.approx(float((own - 0.1).mean()), abs=1e-12)
    assert error == pytest.approx(float(own.std() / math.sqrt(200)), abs=1e-12)
    assert found.difference("high", "low")[0] == pytest.approx(-delta, abs=1e-12)
    assert found.verdict("low", "high") == "worse in these runs; 3 seeds of each would decide between the methods"
    assert found.verdict("high", "low").startswith("better")
    assert found.warnings == ()
    assert "from high: worse" in found.table()["low"]


def test_the_variance_over_runs_counts():
    common = torch.randn(100)
    a = [estimate(common + shift) for shift in (0.0, 0.3, 0.6)]
    b = [estimate(common - 0.2 + shift) for shift in (0.0, 0.1, -0.1)]
    found = compare({"a": a, "b": b})
    delta, error = found.difference("a", "b")
    assert delta == pytest.approx(0.5)
    variance = float(torch.tensor([0.0, 0.3, 0.6]).var() + torch.tensor([0.0, 0.1, -0.1]).var()) / 3
    assert error == pytest.approx(math.sqrt(variance), abs=1e-9)
    assert found.verdict("a", "b") == "better; decided over 3 seeds"
    assert "(3 runs)" in found.table()["a"]
    close = compare({"a": a, "b": [estimate(e.log_px + 0.45) for e in b]})
    assert close.verdict("b", "a") == "not decided: within two standard errors"


def test_other_data_another_base_measure_and_undequantised_levels_are_refused():
    x = torch.randn(20)
    with pytest.raises(UsageError, match="other data, or on another binarisation"):
        compare({"a": estimate(x), "b": estimate(x, digest="xyz")})
    with pytest.raises(UsageError, match="other data"):
        compare({"a": estimate(x), "b": estimate(x[:10])})
    with pytest.raises(UsageError, match=r"'binary' and of b to 'density'.*not ranked"):
        compare({"a": estimate(x), "b": estimate(x, base="density")})
    with pytest.raises(UsageError, match=r"no ceiling.*dequantize=True"):
        compare({"a": estimate(x, base="density on [0, 1]"), "b": estimate(x, base="density on [0, 1]")})
    with pytest.raises(UsageError, match="two models"):
        compare({"a": estimate(x)})
    with pytest.raises(UsageError, match="two models"):
        compare({"a": estimate(x), "b": []})


def test_unequal_tightness_is_said():
    x = torch.randn(100)
    assert compare({"a": estimate(x), "b": estimate(x)}).warnings == ()
    (text,) = compare({"a": estimate(x), "b": estimate(x, particles=5000)}).warnings
    assert "unequal tightness" in text
    assert "num_particles 100" in text
    assert "num_particles 5000" in text
    (text,) = compare({"a": estimate(x), "b": estimate(x, bad=10)}).warnings
    assert "10.0 % of the data of b" in text
    annealed = estimate(x, method="annealed importance sampling", settings={"num_temperatures": 100})
    (text,) = compare({"a": estimate(x), "b": annealed}).warnings
    assert "annealed importance sampling" in text
    assert any(
        "lower bounds only: b" in w
        for w in compare({"a": estimate(x), "b": estimate(x, lower_bound_only=True)}).warnings
    )
    broken = x.clone()
    broken[3] = math.nan
    found = compare({"a": estimate(broken), "b": estimate(x)})
    assert found.names[0] == "b"
    assert any("not finite for some data: a" in w for w in found.warnings)
    assert found.verdict("a", "b") == "not decided: within two standard errors"


def test_estimates_come_back_from_their_files(tmp_path):
    pair = LinearGaussian(4, 2).requires_grad_(False)
    x = torch.randn(30, 4)
    paths, found = {}, {}
    for name, guide in (("exact", pair.guide), ("mean field", pair.mean_field)):
        found[name] = log_marginal(pair.model, guide, x, num_particles=50, proposal="guide")
        paths[name] = found[name].save(tmp_path, name)
    a, b = compare(found), compare(paths)
    for field in dataclasses.fields(Comparison):
        one, other = getattr(a, field.name), getattr(b, field.name)
        same = torch.allclose(one, other, equal_nan=True) if isinstance(one, torch.Tensor) else one == other
        assert same, field.name
    again = Comparison.load(a.save(tmp_path))
    assert again.names == a.names
    assert torch.equal(again.log_px, a.log_px)
    for text in ("{}", "no", "[1]"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a saved estimate"):
            load_estimate(tmp_path / "other.json")
    with pytest.raises(UsageError, match="expected one of"):
        a.difference("exact", "neither")


def test_an_estimate_is_read_back_whole(tmp_path):
    pair = LinearGaussian(4, 2).requires_grad_(False)
    x = torch.randn(12, 4)
    est = log_marginal(pair.model, pair.mean_field, x, num_particles=60, posterior_draws=3, proposal="guide")
    annealing = {"num_temperatures": 20, "start": "guide"}
    trusted = torch.arange(12) % 2 == 0
    other = dataclasses.replace(
        est, method="annealed importance sampling", settings=annealing, diagnostics={"acceptance": est.ess / 60},
        reliable_override=trusted, notes=("one thing", "another"), levels=256, posterior=None,
    )  # fmt: skip
    for one, name in ((est, "plain"), (other, "annealed")):
        again = load_estimate(one.save(tmp_path, name))
        assert again.table() == one.table()
        assert again.summary() == one.summary()
        assert again.notes == one.notes
        assert torch.equal(again.reliable, one.reliable)
        assert again.bounds.keys() == one.bounds.keys()
        assert all(torch.equal(again.bounds[k], one.bounds[k]) for k in one.bounds)
        assert all(torch.equal(again.per_datum()[k], v.double()) for k, v in one.per_datum().items() if k != "reliable")
    assert torch.equal(load_estimate(tmp_path / "plain.json").posterior["z"], est.posterior["z"])


def test_arviz_compares_the_same_numbers():
    common = -5000 + torch.randn(300)  # exp of it underflows
    found = compare({"a": estimate(common), "b": estimate(common - 0.5 + 0.2 * torch.randn(300))})
    table = found.to_arviz()
    delta, error = found.difference("a", "b")
    assert list(table.index) == ["a", "b"]
    elpd = next(name for name in ("elpd_loo", "elpd") if name in table)  # ArviZ 0.x and 1.x
    assert table.loc["a", elpd] == pytest.approx(float(common.sum()))
    assert table.loc["b", "elpd_diff"] == pytest.approx((-1 if elpd == "elpd" else 1) * 300 * delta)
    assert table.loc["b", "dse"] == pytest.approx(300 * error, rel=0.01)
    assert table["weight"].sum() == pytest.approx(1, abs=1e-6)
    assert table.loc["a", "weight"] > 0.9


def test_what_a_bracket_found_is_no_setting_of_an_estimate():
    made = [
        estimate(
            torch.randn(20), settings={"proposal": "refined", "bracket_width": width, "bracket": f"within {width}"}
        )
        for width in (0.1, 0.2)
    ]
    assert not compare({"a": made[0], "b": made[1]}).warnings
    other = estimate(torch.randn(20), settings={"proposal": "guide"})
    assert "unequal tightness" in compare({"a": made[0], "b": other}).warnings[0]


def test_what_is_no_estimate_is_refused_and_the_cure_works():
    pair, x = LinearGaussian(3, 2), torch.zeros(20, 3)
    exact = quadrature(pair.model, pair.guide, x)
    with pytest.raises(UsageError, match=r"found Quadrature\. Pass log_marginal"):
        compare({"a": exact, "b": exact})
    est = log_marginal(pair.model, pair.guide, x, num_particles=30)
    assert compare({"a": est, "b": est}).names[0] in "ab"
