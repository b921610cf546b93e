"""Distributions as people write them: without support, in wrappers, expanded by Pyro, flows without an inverse."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from torch import nn

from ppvae import check, fit, log_marginal
from ppvae.errors import ContractError
from ppvae.evaluation import annealed, bdmc, quadrature
from ppvae.inference import inspect, terms
from ppvae.objectives import ELBO, IWAE

N, D = 12, 3
WEIGHT = [[1.0, -1.0, 0.5], [0.3, 1.0, -2.0]]

pytestmark = pytest.mark.usefixtures("float64")


def laplace(expand):
    """A Laplace distribution in the least that Pyro asks of a class, with an `expand` of one's choice."""

    class MyLaplace(dist.TorchDistribution):
        arg_constraints = {}  # noqa: RUF012
        has_rsample = True

        def __init__(self, loc):
            self.loc = loc
            super().__init__(loc.shape, validate_args=False)

        def rsample(self, sample_shape=()):
            return dist.Laplace(self.loc, 1.0).rsample(torch.Size(sample_shape))

        def log_prob(self, value):
            return -(value - self.loc).abs() - math.log(2)

    if expand == "shape alone":
        MyLaplace.expand = lambda self, batch_shape: MyLaplace(self.loc.expand(batch_shape))
    elif expand == "with instance":
        MyLaplace.expand = lambda self, batch_shape, _instance=None: MyLaplace(self.loc.expand(batch_shape))
    elif expand == "no support attribute":
        MyLaplace.support = property(lambda self: self.no_such_attribute)
    return MyLaplace


def torch_laplace(loc):
    return dist.Laplace(loc, 1.0)


def pair(prior, likelihood, posterior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(torch.zeros(len(x), D)).to_event(1))
            pyro.sample("x", likelihood(z).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(slope * x).to_event(1))

    return model, guide


@pytest.mark.parametrize("expand", ["shape alone", "with instance", "Pyro's own", "no support attribute"])
@pytest.mark.parametrize("side", ["prior", "likelihood", "posterior", "all"])
def test_a_user_s_class_gives_the_numbers_of_torch_s(side, expand):
    names = ("prior", "likelihood", "posterior")
    mine = laplace(expand)
    x, results = torch.randn(N, D), []
    for sides in (pair(*[torch_laplace] * 3), pair(*(mine if side in (n, "all") else torch_laplace for n in names))):
        pyro.clear_param_store()
        run = fit(*sides, x, epochs=2)
        results.append(log_marginal(run.model, run.guide, x, num_particles=250, proposal="guide").log_px)
        assert "Laplace" in check(run.model, run.guide, x)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)


def test_annealing_says_that_it_needs_a_support():
    model, guide = pair(torch_laplace, torch_laplace, laplace("with instance"))
    run = fit(model, guide, torch.randn(N, D), epochs=1)
    with pytest.raises(ContractError, match=r"'z'.*declares its support.*MyLaplace"):
        annealed(run.model, run.guide, torch.randn(N, D), num_chains=2, num_temperatures=3)


def test_a_guide_without_support_that_misses_the_prior_is_refused():
    """Its density decides where no support does."""

    class Half(laplace("with instance")):
        def expand(self, batch_shape, _instance=None):
            return Half(self.loc.expand(batch_shape))

        def rsample(self, sample_shape=()):
            return dist.Exponential(torch.ones_like(self.loc)).rsample(torch.Size(sample_shape))

        def log_prob(self, value):
            return torch.where(value > 0, -value, -torch.inf)

    with pytest.raises(ContractError, match=r"'z'.*Half"):
        inspect(*pair(torch_laplace, torch_laplace, Half), torch.randn(N, D))


# -- flows ------------------------------------------------------------------------------------------------------------


def log_px_on_a_grid(prior, decoder, x):
    t = torch.linspace(-7, 7, 281)
    z = torch.cartesian_prod(t, t)
    with torch.no_grad():
        joint = prior(z) + dist.Normal(decoder(z), 0.5).to_event(1).log_prob(x[:, None])
    return joint.logsumexp(1) + 2 * math.log(float(t[1] - t[0]))


def test_zuko_s_flows_by_pyro_s_wrapper():
    prior = zuko.flows.MAF(2, transforms=2, hidden_features=(8,))
    posterior = zuko.flows.NSF(2, D, transforms=1, hidden_features=(8,))
    decoder = nn.Linear(2, D)

    def model(x):
        pyro.module("prior", prior)
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", ZukoToPyro(prior()))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("posterior", posterior)
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(posterior(x)))

    x = torch.randn(N, D)
    run = fit(model, guide, x, epochs=100, optimizer=lambda p: torch.optim.Adam(p, lr=0.03))
    exact = log_px_on_a_grid(prior().log_prob, decoder, x)
    est = log_marginal(run.model, run.guide, x, num_particles=3000, proposal="guide")
    assert bool(((est.log_px - exact).abs() < 5 * est.std_error + 0.01).all())
    assert inspect(run.model, run.guide, x).layout == "vectorized"
    for objective in (ELBO(gradient="stl"), IWAE(3, gradient="dreg")):
        fit(model, guide, x, epochs=1, objective=objective)


WITHOUT_INVERSE = {
    "planar": lambda: dist.transforms.planar(2),
    "radial": lambda: dist.transforms.radial(2),
    "block": lambda: dist.transforms.block_autoregressive(2, residual="normal"),
    "conditional": lambda: dist.transforms.conditional_planar(2, D),
}


def flow_pair(name):
    """Factor analysis, a flow without an inverse as its guide, and the marginal."""
    weight, encoder, flow = torch.tensor(WEIGHT), nn.Linear(D, 2), WITHOUT_INVERSE[name]()
    S = torch.linalg.inv(torch.eye(2) + weight @ weight.T)
    with torch.no_grad():
        encoder.weight.copy_((weight.T @ S).T)
        encoder.bias.zero_()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(encoder(x), 0.8).to_event(1)
            transform = flow.condition(x) if name == "conditional" else flow
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    return model, guide, dist.MultivariateNormal(torch.zeros(D), torch.eye(D) + weight.T @ weight)


@pytest.mark.parametrize("name", WITHOUT_INVERSE)
def test_flows_without_an_inverse_are_vectorised_and_right(name):
    model, guide, p = flow_pair(name)
    x = torch.randn(N, D)
    run = fit(model, guide, x, epochs=60, optimizer=lambda p: torch.optim.Adam(p, lr=0.02))
    structure = inspect(run.model, run.guide, x)
    assert (structure.layout, structure.no_inverse) == ("vectorized", ("z",))
    est = log_marginal(run.model, run.guide, x, num_particles=5000, proposal="guide")
    assert bool(((est.log_px - p.log_prob(x)).abs() < 5 * est.std_error + 0.01).all())
    assert float(est.std_error.max()) < 0.2


def test_what_needs_an_inverse_says_so_in_a_sentence():
    model, guide, _ = flow_pair("planar")
    x = torch.randn(N, D)
    words = r"site 'z': expected a density that can be evaluated at given values.*a flow without an inverse.*pathwise"
    for objective in (ELBO(gradient="stl"), IWAE(3, gradient="dreg"), IWAE(3, gradient="gdreg")):
        with pytest.raises(ContractError, match=words):
            fit(model, guide, x, epochs=1, objective=objective)
    with pytest.raises(ContractError, match=words):
        annealed(model, guide, x, num_chains=2, num_temperatures=3)
    with pytest.raises(ContractError, match=words):
        terms(model, guide, x, 2, values={"z": torch.zeros(2, N, 2)})
    fit(model, guide, x, epochs=1, objective=IWAE(3, gradient="pathwise"))


class WrongJacobian(dist.transforms.Planar):
    """A planar flow whose log-determinant is off by a little."""

    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y) + 0.02


@pytest.mark.parametrize(
    ("flow", "words"),
    [
        (lambda: WrongJacobian(2), "its log_abs_det_jacobian is wrong.*WrongJacobian"),
        (lambda: dist.transforms.sylvester(2, 2), "its log_abs_det_jacobian is wrong.*Sylvester"),
        (lambda: dist.transforms.block_autoregressive(2), "stays within .* of zero.*residual"),
    ],
    ids=["jacobian", "Pyro's Sylvester", "bounded"],
)
def test_a_flow_without_an_inverse_that_is_no_density_on_the_prior_s_space(flow, words):
    """Evaluated at its own draws alone, either would go into every weight."""
    torch.manual_seed(0)
    made = flow()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))  # an initial flow may be nearly the identity

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 20.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("flow", made)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x, 1.0).to_event(1), [made]))

    with pytest.raises(ContractError, match=f"'z'.*{words}"):
        log_marginal(model, guide, torch.randn(N, 2), proposal="guide")
    assert inspect(model, guide, torch.randn(N, 2), weights=False).weights_refusal


def test_a_prior_without_an_inverse_has_no_density_at_the_guide_s_draws():
    flow = dist.transforms.planar(2)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            z = pyro.sample("z", dist.TransformedDistribution(base, [flow]))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ContractError, match=r"'z'.*evaluated at given values.*TransformedDistribution"):
        log_marginal(model, guide, torch.randn(N, 2), proposal="guide")


class Shapeless(dist.Distribution):
    """The least that Pyro's losses ask of a distribution."""

    def __init__(self, loc):
        self.loc = loc

    def sample(self, *args, **kwargs):
        return self.loc + torch.randn(self.loc.shape)

    def log_prob(self, value, *args, **kwargs):
        return dist.Normal(self.loc, 1.0).log_prob(value)


class WithShapes(Shapeless, dist.TorchDistribution):
    def __init__(self, loc):
        Shapeless.__init__(self, loc)
        dist.TorchDistribution.__init__(self, loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return WithShapes(self.loc.expand(batch_shape))


@pytest.mark.parametrize("place", ["prior", "likelihood", "guide"])
def test_a_distribution_without_shapes_is_refused_and_the_cure_gives_exact_weights(place):
    def pair_with(kind):
        own = {"prior": dist.Normal, "likelihood": dist.Normal, "guide": dist.Normal, place: lambda loc, _: kind(loc)}

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", own["prior"](torch.zeros(len(x)), 1.0))
                pyro.sample("x", own["likelihood"](z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", own["guide"](x / 2, 0.5**0.5 if place != "guide" else 1.0))

        return model, guide

    x = torch.randn(N)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    for ask in (check, log_marginal):
        with pytest.raises(ContractError, match=r"site '[xz]'.*Shapeless, which has none. Derive it from pyro.dist"):
            ask(*pair_with(Shapeless), x)
    est = log_marginal(*pair_with(WithShapes), x, num_particles=2000, progress=False, proposal="guide").log_px
    assert (est - exact).abs().max() < (0.1 if place == "guide" else 1e-9)


LIKELIHOODS = {
    "Bernoulli": (lambda z: dist.Bernoulli(logits=z), (torch.bool, torch.int64, torch.uint8)),
    "Geometric": (lambda z: dist.Geometric(logits=z), (torch.bool, torch.uint8)),  # whose density negates the value
    "Normal": (lambda z: dist.Normal(z, 1.0), (torch.bool,)),
    "Categorical": (lambda z: dist.Categorical(logits=torch.stack([z, -z], -1)), ()),
    "Poisson": (lambda z: dist.Poisson(z.exp()), ()),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_bools_and_integers_are_taken_as_numbers_or_refused_with_a_cure_that_works(name):
    likelihood, refused = LIKELIHOODS[name]
    bits = torch.arange(N) % 3 == 0

    def model_of(obs):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample("x", likelihood(z), obs=obs(x))

        return model

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    z = torch.linspace(-12, 12, 20_001)[:, None].expand(-1, N)
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + likelihood(z).log_prob(bits.double())
    exact = log_p.logsumexp(0) + math.log(24 / 20_000)
    plain, cured = model_of(lambda x: x), model_of(lambda x: x.double())
    for dtype in (torch.bool, torch.int64, torch.uint8):
        x = bits.to(dtype)
        if dtype in refused:
            for ask in (check, log_marginal):
                with pytest.raises(ContractError, match=f"'x'.*{name} computes with; found {str(dtype)[6:]}.*float"):
                    ask(plain, guide, x)
        for model, values in ((cured, x), (plain, x.double()), *([] if dtype in refused else [(plain, x)])):
            assert (quadrature(model, guide, values).log_px - exact).abs().max() < 1e-6
        if name in ("Bernoulli", "Categorical"):  # whose draws a column of this type holds
            assert bdmc(cured, guide, x[:3], num_temperatures=3, progress=False).lower.isfinite().all()
