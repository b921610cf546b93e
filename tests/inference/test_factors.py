"""Terms that are no density: `pyro.factor`, what a guide observes, improper priors."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import fit, log_marginal, objectives
from ppvae.errors import ContractError
from ppvae.evaluation import annealed, bdmc, calibration, quadrature
from ppvae.inference import Role, inspect, terms

X = torch.linspace(-2, 2, 20)
EXACT = dist.Normal(0.0, 1.25**0.5).log_prob(X.double())  # of z ~ N(0, 1), x ~ N(z, 1/2)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide_with(term, learned=False):
    """The exact posterior, with a further term of the loss."""

    def guide(x):
        with pyro.plate("data", len(x)):
            scale = pyro.param("scale", torch.tensor(0.2**0.5)) if learned else 0.2**0.5
            z = pyro.sample("z", dist.Normal(0.8 * x, scale))
            term(x, z)

    return guide


GUIDE_TERMS = {
    "factor": lambda x, z: pyro.factor("loss", 3 + z**2, has_rsample=True),
    "negative factor": lambda x, z: pyro.factor("loss", -3 - x, has_rsample=False),
    "observed auxiliary": lambda x, z: pyro.sample("aux", dist.Normal(z, 0.1), obs=x, infer={"is_auxiliary": True}),
    "observed as in the model": lambda x, z: pyro.sample("x", dist.Normal(z, 9.0), obs=x, infer={"is_auxiliary": True}),
    "delta with a log-density": lambda x, z: pyro.sample(
        "loss", dist.Delta(x, log_density=7.0), obs=x, infer={"is_auxiliary": True}
    ),
}


@pytest.mark.parametrize("term", GUIDE_TERMS.values(), ids=GUIDE_TERMS)
def test_a_term_of_the_guide_is_left_out_of_weights_rates_and_metrics(term):
    plain, guide = terms(model, guide_with(lambda x, z: None), X, 3), guide_with(term)
    t = terms(model, guide, X, 3, values={"z": plain.guide["z"].value})
    assert torch.equal(t.log_weight, plain.log_weight)
    assert torch.equal(t.log_guide, plain.log_guide)
    assert Role.FACTOR in [site.role for site in t.guide.values()]
    assert set(t.rates()) == {"z"}
    est = log_marginal(
        model, guide, X, num_particles=200, proposal="guide"
    )  # more particles than a run of the guide takes
    assert (est.log_px - EXACT).abs().max() < 1e-5
    assert est.reliable.all()
    assert est.notes == ()
    runs = [fit(model, guide_with(t, learned=True), X, valid=X, epochs=1, compile=False) for t in (lambda *_: 0, term)]
    for name in ("valid_elbo", "valid_rate", "valid_distortion"):
        assert runs[1].metrics[name] == pytest.approx(runs[0].metrics[name], abs=0.01)
    assert runs[1].metrics["valid_elbo"] == pytest.approx(EXACT.mean().item(), abs=1e-3)


@pytest.mark.parametrize("name", ["factor", "observed auxiliary"])
def test_losses_count_terms_of_the_guide_as_those_of_pyro(name):
    guide = guide_with(GUIDE_TERMS[name], learned=True)
    numbers = []
    for loss in (pyro.infer.Trace_ELBO(), objectives.ELBO()):
        pyro.clear_param_store()
        torch.manual_seed(0)
        value = loss.loss_and_grads(model, guide, X)
        numbers.append((value, pyro.param("scale").grad.item()))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


@pytest.mark.parametrize("gradient", ["stl", "dreg", "score"])
def test_a_gradient_that_is_not_defined_for_terms_of_the_guide_is_refused(gradient):
    guide = guide_with(GUIDE_TERMS["factor"], learned=True)
    with pytest.raises(ContractError, match=r"'loss'.*term of the loss alone.*pathwise"):
        objectives.ELBO(gradient=gradient).loss(model, guide, X)
    assert math.isfinite(objectives.IWAE(2, gradient="pathwise").loss(model, guide, X))  # the cure


def test_a_sampled_site_that_the_model_observes_is_still_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.5))
            pyro.sample("x", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    with pytest.raises(ContractError, match="'x'"):
        inspect(model, guide, X)


# -- factors of the model ---------------------------------------------------------------------------------------------

BITS = torch.bernoulli(torch.full((20, 1), 0.5), generator=torch.Generator().manual_seed(0))
U = torch.linspace(-12, 12, 20001, dtype=torch.float64)
LOG_PRIOR = dist.Normal(0.0, 1.0).log_prob(U) + (U[1] - U[0]).log()


def factor_model(kind):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if kind == "alone":
                pyro.factor("lik", dist.Bernoulli(logits=z).log_prob(x[:, 0]))
                return
            pyro.sample("x", dist.Bernoulli(logits=z.unsqueeze(-1)).to_event(1), obs=x)
            if kind == "sparse":
                pyro.factor("sparse", -0.5 * z**2)
            if kind == "delta":
                pyro.sample("sparse", dist.Delta(torch.zeros(len(x)), log_density=-0.5 * z**2), obs=torch.zeros(len(x)))
        if kind == "batch":
            pyro.factor("mmd", -(z.mean(-1) ** 2))

    return model


def prior_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def exact_with(log_factor):
    log_lik = dist.Bernoulli(logits=U).log_prob(BITS.double())
    return (LOG_PRIOR + log_lik + log_factor).logsumexp(1)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", ["sparse", "delta", "alone"])
def test_a_factor_of_the_model_counts_and_the_result_says_so(kind):
    exact = exact_with(0.0 if kind == "alone" else -0.5 * U**2)
    pair = factor_model(kind), prior_guide
    pyro.clear_param_store()
    fit(*pair, BITS, epochs=1, optimizer=functools.partial(torch.optim.SGD, lr=0.0), compile=False)
    est = log_marginal(*pair, BITS, num_particles=5000, proposal="guide")
    assert ((est.log_px - exact).abs() < 5 * est.std_error).all()
    assert (quadrature(*pair, BITS).log_px - exact).abs().max() < 1e-5
    assert (annealed(*pair, BITS, num_temperatures=30, num_leapfrog=4).log_px - exact).abs().mean() < 0.1
    assert est.base_measure == ("none" if kind == "alone" else "binary")
    assert "not normalised" in est.summary()
    assert est.dims == (kind != "alone")
    assert math.isnan(est.bits_per_dim) == (kind == "alone")
    with pytest.raises(ContractError, match=f"'{'lik' if kind == 'alone' else 'sparse'}'.*simulated data"):
        bdmc(*pair, BITS, num_temperatures=2)
    with pytest.raises(ContractError, match="simulated data"):
        calibration(*pair, BITS, replications=20)


def test_a_factor_beside_summed_out_sites_counts():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.factor("weight", 2.0 * k)
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    est = log_marginal(model, lambda x: None, X, num_particles=1, proposal="guide")
    k = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    exact = (dist.Bernoulli(0.3).log_prob(k) + 2 * k + dist.Normal(k, 1.0).log_prob(X.double())).logsumexp(0)
    assert (est.log_px - exact).abs().max() < 1e-5
    assert "not normalised" in est.summary()


def test_a_factor_of_the_batch_is_refused_where_weights_are_asked_for_and_trains():
    pair = factor_model("batch"), prior_guide
    with pytest.raises(ContractError, match=r"'mmd'.*batch as a whole.*Trace_ELBO"):
        log_marginal(*pair, BITS, proposal="guide")
    with pytest.raises(ContractError, match="'mmd'"):
        fit(*pair, BITS, epochs=1, objective=objectives.ELBO())
    assert "train_elbo" not in fit(*pair, BITS, epochs=1, compile=False).metrics  # the cure


def test_a_factor_of_all_data_belongs_to_a_joint_weight():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("ridge", -0.5 * mu**2)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 2), 1.2 * (len(x) + 2) ** -0.5))

    log_joint = LOG_PRIOR - 0.5 * U**2 + dist.Normal(U, 1.0).log_prob(X.double()[:, None]).sum(0)
    est = log_marginal(model, guide, X, num_particles=5000, proposal="guide")
    assert abs(est.log_px.item() - log_joint.logsumexp(0).item()) < 5 * est.std_error.item()


def test_an_improper_prior_is_named():
    def improper(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.6))

    est = log_marginal(improper, guide, X, num_particles=2000, proposal="guide")
    assert est.log_px.abs().max() < 0.1  # the integral of the likelihood over z is one
    assert "site 'z' is no density" in est.summary()
