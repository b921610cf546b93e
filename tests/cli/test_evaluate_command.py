"""`ppvae evaluate --method annealed | smc | bdmc`, and how loose importance sampling is beside them."""

import dataclasses
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import log_marginal, plots
from ppvae.cli.main import main
from ppvae.errors import UsageError
from ppvae.evaluation import annealed, load_estimate, looseness
from ppvae.evaluation.annealing import hmc
from ppvae.evaluation.annealing.bdmc import Bracket
from ppvae.evaluation.compare import looseness_and_error, looseness_notes
from ppvae.models import LinearGaussian


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(hmc, "WARM_UP_TRANSITIONS", 8)
    monkeypatch.setattr(hmc, "MIN_PILOT_TRANSITIONS", 1)
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


# How loose


@pytest.fixture(scope="module")
def both():
    """(annealed, importance sampling from the prior, exact) of 100 data: the latter is several nats too low."""
    pyro.clear_param_store()
    torch.manual_seed(1)
    pair = LinearGaussian(20, 4, 0.4).double().requires_grad_(False)

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(4).double(), 1.0).to_event(1))

    x = dist.LowRankMultivariateNormal(pair.loc, pair.weight, 0.16 * torch.ones(20).double()).sample((100,))
    words = {"num_chains": 8, "num_temperatures": 60, "num_leapfrog": 4}
    return (
        annealed(pair.model, pair.mean_field, x, **words),
        log_marginal(pair.model, prior, x, num_particles=300, bounds=(30,), proposal="guide"),
        pair.log_px(x),
    )


def test_the_looseness_is_that_of_the_exact_value(both):
    """Paired over 100 data; annealing is exact to 0.05 here, so that 5 standard errors and it bound the difference."""
    tighter, est, exact = both
    assert (tighter.log_px - exact).mean().abs() < 0.05
    for k in (1, 30, 300):
        mean, error = looseness_and_error(tighter, est, k)
        loose = exact - (est.log_px if k == 300 else est.bound(k))
        assert loose.mean() > 1
        assert abs(mean - loose.mean()) < 0.05
        assert error == pytest.approx(float((tighter.log_px - exact + loose).std()) / 10)
    assert torch.equal(looseness(tighter, est), looseness(tighter, est, 300))
    found = [looseness_and_error(tighter, est, k)[0] for k in (1, 30, 300)]
    assert found == sorted(found, reverse=True)


def test_the_words_say_which_is_nearer(both):
    tighter, est, _ = both
    numbers, meaning = looseness_notes(tighter, est, (30,))
    mean, error = looseness_and_error(tighter, est)
    assert f"{tighter.nll:.3f} by annealed importance sampling" in numbers
    assert f"{-float(est.bound(30).mean()):.3f} by L_30, {est.nll:.3f} by L_300" in numbers
    assert f"{mean:.3f} ± {error:.3f} nats loose at K = 300" in numbers
    assert "lower bounds of log p(x) on average" in meaning
    assert ";" not in numbers + meaning  # notes are joined by it in files
    assert "the tighter one by" in looseness_notes(est, dataclasses.replace(tighter, num_particles=300))[0]
    same = looseness_notes(est, est)[0]
    assert "not seen to be loose (0.000 ± 0.000 nats) at K = 300" in same


def test_other_data_or_measures_have_no_difference(both):
    tighter, est, _ = both
    for change, words in (({"digest": "x"}, "same data"), ({"base_measure": "binary"}, "'density' and to 'binary'")):
        with pytest.raises(UsageError, match=words):
            looseness(tighter, dataclasses.replace(est, **change))
    with pytest.raises(UsageError, match=r"bound\(7\)"):
        looseness(tighter, est, 7)


def test_one_estimate_for_all_data_has_the_error_of_its_chains():
    def of(log_px, error):
        v = torch.tensor([log_px]).double()
        return dataclasses.replace(_plain(v), std_error=torch.tensor([error]).double(), joint=True)

    assert looseness_and_error(of(-1.0, 0.3), of(-3.0, 0.4)) == pytest.approx((2.0, 0.5))


def _plain(v):
    from ppvae.evaluation.estimate import Estimate

    return Estimate(v, v, v, v, v, 0 * v, 100, 0, 3, "density")


def test_the_pictures_show_the_numbers(both):
    tighter, est, _ = both
    figure = plots.looseness_curve(tighter, est)
    curve, line = figure.axes[0].lines[:2]
    assert curve.get_ydata()[-1] == pytest.approx(float(est.log_px.mean()))
    assert curve.get_ydata()[0] == pytest.approx(float(est.bound(1).mean()))
    assert line.get_ydata()[0] == pytest.approx(float(tighter.log_px.mean()))
    assert sum(p.get_height() for p in figure.axes[1].patches) == 100
    assert plots.to_png(figure)
    one = torch.arange(5).double()
    broken = Bracket(-one, torch.where(one > 3, math.nan, 0.1 - one), 0 * one, 0 * one, one, 0 * one, 0)
    assert "1 datum that is not finite" in " ".join(plots.notes(plots.bracket(broken)))
    assert plots.to_png(plots.bracket(broken))


# The command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["--epochs", "1", "--hidden", "16", "--latent", "3", "--runs", str(folder), "--name", "a", "--no-report"]
    assert main(["fit", "ppvae.models:vae", *words]) == 0
    return folder / "a"


SHORT = ["--num-chains", "4", "--num-temperatures", "6", "--num-leapfrog", "2", "--num-particles", "40"]


def test_annealing_lies_beside_importance_sampling_of_the_same_data(run, capsys):
    assert main(["evaluate", str(run), "--num-particles", "30", "--no-report"]) == 0
    whole = (run / "results" / "log_marginal.json").read_bytes()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--method", "annealed", "--head", "20", *SHORT, "--beside", "80"]) == 0
    out = capsys.readouterr().out
    tighter, est = (load_estimate(run / "results" / f"{name}.json") for name in ("annealed", "annealed_beside"))
    assert (len(tighter.log_px), len(est.log_px), tighter.digest) == (20, 20, est.digest)
    assert (tighter.num_particles, est.num_particles) == (4, 80)
    mean, error = looseness_and_error(tighter, est, 40)
    for text in (f"({mean:.3f} ± {error:.3f}", f"{mean:.3f} ± {error:.3f} nats"):
        assert text in out or f"{-mean:.3f} ± {error:.3f}" in out
    for text in ("at K = 40", "at K = 80", "num_temperatures", "lower bounds of log p(x) on average", "reliability"):
        assert text in out
    assert (run / "results" / "log_marginal.json").read_bytes() == whole
    assert (run / "results" / "annealed.nc").exists()
    assert not (run / "results" / "annealed_blocks").exists()
    page = (run / "report.html").read_text()
    assert "Importance sampling compared with annealed importance sampling" in page
    assert f"{est.nll:.3f} by L_80" in page
    assert "360 data" in page  # the headline stays that of the whole test set
    assert (run / "pictures" / "annealed.png").exists()
    alone = log_marginal_of(run, 20, 40)
    assert torch.allclose(alone.log_px, est.bound(40), atol=2.0)
    assert alone.digest == est.digest


def test_auto_anneals_what_refined_importance_sampling_fails_on(run, capsys):
    """No datum reaches an ess of 50 with 40 particles: all are annealed, and the table and the file say so."""
    est = log_marginal_of(run, 4, 40, "--method", "auto", "--bracket", "0")
    out = capsys.readouterr().out
    assert est.diagnostics["method"].tolist() == [1, 1, 1, 1]
    assert est.guide_estimate.method == "importance sampling"
    assert "by annealing from the refined proposal (100 chains): 4" in " ".join(out.split())


def log_marginal_of(run, head, particles, *options):
    out = ["--num-particles", str(particles), "--head", str(head), "--split", "test", "--no-report", *options]
    kept = {path: path.read_bytes() for path in (run / "results").glob("log_marginal*.*")}
    assert main(["evaluate", str(run), *out]) == 0
    found = load_estimate(run / "results" / "log_marginal.json")
    for path, content in kept.items():
        path.write_bytes(content)
    return found


def test_the_bracket_certifies_the_settings_on_simulated_data(run, capsys):
    assert main(["evaluate", str(run), "--method", "smc", "--head", "10", "--resample", "0.9", *SHORT]) == 0
    assert load_estimate(run / "results" / "smc.json").settings["resample"] == 0.9
    assert main(["evaluate", str(run), "--method", "bdmc", "--head", "10", *SHORT[:-2]]) == 0
    out = capsys.readouterr().out
    assert "10 simulated from the model" in out
    assert "says nothing of other data" in out
    found = Bracket.load(run / "results" / "bdmc.json")
    assert found.settings["num_temperatures"] == 6
    page = (run / "report.html").read_text()
    assert "Bounds on log p(x) of simulated data" in page
    assert "says nothing of other data" in page
    assert "sequential Monte Carlo above" in page
    assert (run / "pictures" / "bdmc.png").exists()


@pytest.mark.parametrize("method", ["annealed", "bdmc"])
def test_an_interrupted_command_goes_on(run, capsys, monkeypatch, method):
    from ppvae.evaluation.annealing import ais, bdmc

    command = ["evaluate", str(run), "--method", method, "--split", "valid", "--head", "70", "--no-report", *SHORT]
    command = command if method == "annealed" else command[:-2]  # of importance sampling beside annealing
    module, name = (ais, "_anneal_block") if method == "annealed" else (bdmc, "_bracket_block")
    real, calls = getattr(module, name), []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, name, stopped)
    assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    blocks = run / "results" / f"{method}_valid_blocks"
    assert any(blocks.iterdir())
    assert main([*command, "--num-temperatures", "7"]) == 2  # the last one counts
    assert "num_temperatures is 6 there and 7 here" in capsys.readouterr().err
    written = {p.name: p.stat().st_mtime_ns for p in blocks.glob("*.npz")}
    seen = {}

    def looked(*args):
        seen.update({p.name: p.stat().st_mtime_ns for p in blocks.glob("*.npz") if p.name in written})
        return real(*args)

    monkeypatch.setattr(module, name, looked)
    assert main(command) == 0
    assert seen == written
    assert not blocks.exists()
    assert json.loads((run / "results" / f"{method}_valid.json").read_text())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-chains", "0"], "--num-chains: expected at least 1, found 0"),
        (["--num-temperatures", "0"], "--num-temperatures: expected at least 1"),
        (["--num-leapfrog", "-1"], "--num-leapfrog: expected at least 1"),
        (["--head", "0"], "head"),
        (["--num-particles", "0"], "--num-particles: expected at least 1"),
        (["--beside", "0"], "--beside: expected at least 1"),
        (["--resample", "0.7"], "--resample: goes with --method smc; found annealed"),
        (["--start", "mode"], "start"),
        (["--method", "anealed"], "method"),
        (["--num-chain", "3"], "did you mean --num-chains"),
        (["--method", "importance", "--num-temperatures", "5"], "goes with --method annealed, smc, bdmc"),
        (["--precision", "bf16"], "--precision: goes with --method importance, auto; found annealed"),
        (["--method", "bdmc", "--beside", "50"], "--beside: goes with --method annealed, smc; found bdmc"),
        (["--method", "importance", "--num-particles", "0"], "--num-particles: expected at least 1"),
        (["--method", "smc", "--resample", "2"], "--resample: expected a share from 0 to 1"),
    ],
)
def test_options_that_cannot_be_used_are_one_short_error(run, capsys, options, words):
    assert main(["evaluate", str(run), "--method", "annealed", *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) <= 3
    assert not (run / "results" / "annealed_blocks").exists()


PAIRS = """
import pyro
import pyro.distributions as dist
import torch

from ppvae import VAE, likelihoods, nn, posteriors, priors


def relaxed():
    return VAE(
        priors.RelaxedOneHot(classes=4), likelihoods.Bernoulli(nn.mlp(4, 64, hidden=(8,))),
        posteriors.RelaxedOneHot(nn.mlp(64, 4, hidden=(8,)), classes=4),
    )


def sphere():
    return VAE(
        priors.UniformOnSphere(3), likelihoods.Bernoulli(nn.mlp(3, 64, hidden=(8,))),
        posteriors.PowerSpherical(nn.mlp(64, 4, hidden=(8,))),
    )
"""


def test_latents_on_a_sphere_are_annealed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PAIRS)
    assert main(["fit", "mine.py:sphere", "--epochs", "1", "--name", "r", "--no-report"]) == 0
    for method in ("annealed", "bdmc"):
        assert main(["evaluate", "r", "--method", method, "--head", "10", *SHORT[:6]]) == 0
    assert bool(load_estimate(tmp_path / "runs" / "r" / "results" / "annealed.json").log_px.isfinite().all())


def test_pairs_that_cannot_be_annealed_say_so(tmp_path, monkeypatch, capsys):
    words = "'z'", "discrete", "leave --method out"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PAIRS)
    assert main(["fit", "mine.py:relaxed", "--epochs", "1", "--name", "r", "--no-report"]) == 0
    for method in ("annealed", "bdmc"):
        capsys.readouterr()
        assert main(["evaluate", "r", "--method", method, "--head", "10", *SHORT[:6]]) == 1
        err = capsys.readouterr().err
        assert err.startswith("ppvae: error: ")
        assert len(err.strip().splitlines()) <= 3
        for word in words:
            assert word in err
    assert main(["evaluate", "r", "--num-particles", "100", "--head", "10", "--no-report"]) == 0
