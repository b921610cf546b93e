"""Laws of priors, each over a dict of constructors: a new prior is tested by one line; then what is known exactly."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from typing import Any

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import VAE, data, fit, likelihoods, log_marginal, nn, posteriors, priors, terms
from ppvae.compilation import graph as graphs
from ppvae.inference import inspect
from ppvae.priors import gaussian_process, mixture
from ppvae.priors.concrete import BinaryConcrete, Concrete
from ppvae.priors.flows import ZukoDistribution, zuko
from tests.laws.latents import FAILURE, Part, fit_of, integral, perturbed, values_of
from tests.laws.law import Laws
from tests.laws.parts import FEATURES, PRIORS, vamp

law = Laws(PRIORS)

OWN_SAMPLER_ONLY = {"MixtureOfNormals", "VampPrior", "Autoregressive"}  # real, and honestly not reparameterised


def made(name: str) -> tuple[Part, torch.nn.Module, Any]:
    """The part, its module in float64 with noise on the parameters, and its distribution."""
    torch.manual_seed(0)
    part = PRIORS[name]
    module = perturbed(part.make(part.size)).eval()
    return part, module, module(**part.given())


@law()
def test_density_is_one(name: str) -> None:
    part, _, fn = made(name)
    assert fn.batch_shape == ()
    assert abs(integral(fn, part.kind) - 1) < part.tolerance


@law()
def test_draws_follow_the_density(name: str) -> None:
    part, _, fn = made(name)
    torch.manual_seed(1)
    assert fit_of(fn, part.kind) > FAILURE / len(PRIORS)


@law()
def test_expands_and_broadcasts(name: str) -> None:
    part, _, fn = made(name)
    z = values_of(part.kind, fn, 4, 5)
    flat = torch.stack([fn.log_prob(row) for row in z.reshape(20, -1)]).reshape(4, 5)
    many = fn.expand([4, 5])
    assert (many.batch_shape, many.event_shape) == ((4, 5), fn.event_shape)
    for value in (
        fn.log_prob(z),
        many.log_prob(z),
        fn.expand([5]).log_prob(z),
        fn.expand([1, 5]).expand([4, 5]).log_prob(z),
    ):
        torch.testing.assert_close(value, flat)
    assert many.log_prob(z[0]).shape == (4, 5)
    torch.testing.assert_close(many.log_prob(z[0])[2], flat[0])
    assert fn.expand([5]).log_prob(z.unsqueeze(1).expand(4, 3, 5, -1)).shape == (4, 3, 5)
    with torch.no_grad():
        assert many.sample((2,)).shape == (2, 4, 5, *fn.event_shape)
    draws = many.sample()
    assert bool(many.support.check(draws).all())
    assert len(draws.reshape(20, -1).unique(dim=0)) > 1, "expanded draws are independent"


@law()
def test_says_honestly_whether_it_is_reparameterised(name: str) -> None:
    part, module, fn = made(name)
    learned = [p for p in module.parameters() if p.requires_grad]
    assert fn.has_rsample == (part.kind != "discrete" and name not in OWN_SAMPLER_ONLY)
    if fn.has_rsample and learned:
        assert fn.rsample((2,)).requires_grad
    if not fn.has_rsample:
        with pytest.raises(NotImplementedError):
            fn.rsample()
    assert not fn.sample((2,)).requires_grad
    assert bool(fn.support.is_discrete) == (part.kind == "discrete") == bool(fn.has_enumerate_support)


@law()
def test_dtype_follows_the_module(name: str) -> None:
    part, module, fn = made(name)
    z = values_of(part.kind, fn, 5)
    assert fn.log_prob(z).dtype == torch.float64
    exact = fn.log_prob(z)
    single = module.float()(**part.given())
    draws = single.sample((3,))
    assert draws.dtype in (torch.float32, torch.long)
    assert single.log_prob(draws).dtype == torch.float32
    torch.testing.assert_close(single.log_prob(z.to(draws.dtype)).double(), exact, rtol=1e-4, atol=1e-4)


@law()
def test_state_saves_and_loads_without_pickles(name: str) -> None:
    part, module, fn = made(name)
    z, file = values_of(part.kind, fn, 5), io.BytesIO()
    torch.save(module.state_dict(), file)
    torch.manual_seed(9)
    other = part.make(part.size).double().eval()
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    torch.testing.assert_close(other(**part.given()).log_prob(z), fn.log_prob(z), rtol=0, atol=0)


@law()
def test_density_is_deterministic_and_follows_a_permutation(name: str) -> None:
    part, module, fn = made(name)
    z, order = values_of(part.kind, fn, 5), torch.tensor([3, 1, 4, 0, 2])
    before, state = fn.log_prob(z), torch.get_rng_state()
    for _ in range(2):
        again = module(**part.given()).log_prob(z)
        torch.testing.assert_close(again, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(fn.log_prob(z[order]), before[order])


@law()
def test_every_parameter_receives_a_gradient(name: str) -> None:
    part, module, fn = made(name)
    if any(p.requires_grad for p in module.parameters()):
        fn.log_prob(values_of(part.kind, fn, 50)).sum().backward()
    for parameter, p in module.named_parameters():
        assert p.grad is not None, parameter
        assert bool((p.grad != 0).any()), parameter
        assert bool(p.grad.isfinite().all()), parameter


@law(lambda n: n not in ("GaussianProcess", "RealNVP"))
def test_nothing_is_made_on_another_device(name: str) -> None:
    part, module, fn = made(name)  # the meta device refuses tensors of any other, and looks at none
    given = {k: v.to("meta") for k, v in part.given().items()}
    z = values_of(part.kind, fn, 5).to("meta")
    with torch.no_grad(), pyro.validation_enabled(False):
        moved = module.to("meta").train()(**given)
        assert moved.expand([5]).log_prob(z).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@law()
def test_same_on_a_gpu(name: str) -> None:
    part, module, fn = made(name)
    z = values_of(part.kind, fn, 5)
    exact = fn.log_prob(z)
    moved = module.cuda()(**{k: v.cuda() for k, v in part.given().items()})
    torch.testing.assert_close(moved.log_prob(z.cuda()).cpu(), exact)
    assert moved.expand([5]).sample((2,)).device.type == "cuda"


@law(lambda n: PRIORS[n].kind == "real")
def test_far_out_it_is_finite_and_right(name: str) -> None:
    part, module, _ = made(name)
    fn = module(**part.given())
    z = torch.tensor([[-300.0], [30.0], [300.0]]).double().expand(3, *fn.event_shape)
    exact = fn.log_prob(z)
    single = module.float()(**part.given()).log_prob(z.float())
    assert bool(exact.isfinite().all())
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-3)


def decoder(size: int) -> torch.nn.Module:
    return nn.mlp(size, FEATURES, hidden=(6,))


def posterior_for(kind: str, size: int) -> torch.nn.Module:
    """A posterior that goes with a prior of z [size] in this space."""
    net = lambda outputs: nn.mlp(FEATURES, outputs, hidden=(6,))  # noqa: E731
    return {
        "real": lambda: posteriors.DiagonalNormal(net(2 * size)),
        "interval": lambda: posteriors.RelaxedBernoulli(net(size)),
        "simplex": lambda: posteriors.LogisticNormal(net(2 * size)),
        "sphere": lambda: posteriors.PowerSpherical(net(size + 1)),
        "discrete": lambda: posteriors.Bernoulli(net(size)),
    }[kind]()  # fmt: skip


@law(lambda n: "Categorical" not in n)
def test_works_in_a_pair_under_the_particle_plate(name: str) -> None:
    part, prior, fn = made(name)
    size = fn.event_shape[0]
    posterior = posterior_for(part.kind, size)
    if "OneHot" in name and part.kind == "discrete":
        posterior = posteriors.OneHot(nn.mlp(FEATURES, size), classes=3)
    vae = VAE(prior, likelihoods.Bernoulli(decoder(size)), posterior).double().train()
    x = (torch.rand(7, FEATURES, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    batch = (x,) if part.context is None else (x, part.context.expand(7, *part.context.shape[1:]))
    structure = inspect(vae.model, vae.guide, batch)
    assert structure.layout == "vectorized"
    t = terms(vae.model, vae.guide, batch, num_particles=4, structure=structure)
    assert t.log_weight.shape == (4, 7)
    assert bool(t.log_weight.isfinite().all())
    t.log_weight.sum().backward()
    for parameter, p in vae.named_parameters():
        assert p.grad is not None, parameter
        assert bool((p.grad != 0).any()), parameter


# ----------------------------------------------------------------------------------------------- what is known exactly


@pytest.mark.parametrize(
    "prior",
    [
        priors.Normal(3), priors.RealNVP(3), priors.MAF(3), priors.NeuralSpline(3), priors.NeuralSpline(1),
        priors.RealNVP(1), priors.MAF(1), priors.Autoregressive(3, components=1), priors.MixtureOfNormals(3, 1),
    ],
    ids=lambda p: f"{type(p).__name__} {sum(1 for _ in p.parameters())}",
)  # fmt: skip
def test_starts_as_the_standard_normal(prior: torch.nn.Module) -> None:
    size = prior().event_shape[0]
    z = 2 * torch.randn(100, size, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(prior.double()().log_prob(z), priors.StandardNormal(size).double()().log_prob(z))


@pytest.mark.parametrize("name", ["RealNVP", "MAF", "NeuralSpline"])
def test_flow_density_is_the_change_of_variables(name: str) -> None:
    torch.manual_seed(0)
    prior = perturbed(PRIORS[name].make(3))
    flow = prior.flow()
    z = torch.randn(5, 3).double()
    for row in z:
        jacobian = torch.autograd.functional.jacobian(flow.transform, row)
        expected = flow.base.log_prob(flow.transform(row)) + jacobian.slogdet().logabsdet
        torch.testing.assert_close(prior().log_prob(row), expected)
    fn = prior()
    drawn = fn.rsample((5,))
    torch.testing.assert_close(fn.log_prob(drawn), prior().log_prob(drawn), rtol=1e-8, atol=1e-8)


def test_learned_normal_is_what_its_parameters_say() -> None:
    prior = perturbed(priors.Normal(3))
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    expected = dist.Normal(prior.loc, prior.log_scale.exp()).log_prob(z).sum(-1)
    torch.testing.assert_close(prior().log_prob(z), expected)


def test_flow_draw_without_a_path_has_the_gradient_of_its_density() -> None:
    torch.manual_seed(0)
    prior = perturbed(priors.MAF(3, hidden=(8,)))
    fn = prior()
    z = fn.sample((5,))
    fn.log_prob(z).sum().backward()
    got = [p.grad.clone() for p in prior.parameters()]
    prior.zero_grad()
    prior().log_prob(z.clone()).sum().backward()
    for a, p in zip(got, prior.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_zuko_leaves_validation_as_it_was() -> None:
    code = (
        "import torch, pyro; before = torch.distributions.Distribution._validate_args; import ppvae.priors;"
        "assert before is torch.distributions.Distribution._validate_args is True"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mixture_is_the_sum_over_its_components() -> None:
    torch.manual_seed(0)
    prior = perturbed(priors.MixtureOfNormals(2, components=4))
    z = torch.randn(6, 2).double()
    parts = torch.stack(
        [dist.Normal(m, s.exp()).to_event(1).log_prob(z) for m, s in zip(prior.loc, prior.log_scale, strict=True)]
    )
    expected = (prior.logits.softmax(0)[:, None] * parts.exp()).sum(0).log()
    torch.testing.assert_close(prior().log_prob(z), expected)
    with torch.no_grad():
        prior.loc[:] = prior.loc[0]
        prior.log_scale[:] = prior.log_scale[0]
    torch.testing.assert_close(prior().log_prob(z), parts[0])


def test_mixture_in_pieces_is_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    prior, z = perturbed(priors.MixtureOfNormals(2, components=4)), torch.randn(3, 50, 2).double()
    whole = prior().log_prob(z)
    monkeypatch.setattr(mixture, "_MAX_ELEMENTS", 20)
    torch.testing.assert_close(prior().log_prob(z), whole, rtol=0, atol=0)


def test_vamp_with_one_pseudo_input_is_the_posterior_there() -> None:
    torch.manual_seed(0)
    prior = perturbed(vamp(3, components=1))
    z = torch.randn(6, 3).double()
    torch.testing.assert_close(prior().log_prob(z), prior.posterior(prior.pseudo_inputs[0]).log_prob(z))


def test_vamp_is_the_mean_of_its_components_and_draws_them_alike() -> None:
    torch.manual_seed(0)
    prior = vamp(1, components=4).double().eval()
    with torch.no_grad():  # components so far apart that a draw tells which it came from
        for p in prior.posterior.parameters():
            p.zero_()
        prior.posterior.net[0].weight[0, 0] = 1.0
        prior.posterior.net[-1].weight[0, 0] = 5.0
        prior.posterior.net[-1].bias[1] = -1.0
        prior.pseudo_inputs[:, 0] = torch.tensor([-2.0, -0.5, 0.5, 2.0])
        z, components = torch.randn(6, 1).double(), prior.posterior(prior.pseudo_inputs)
        loc, scale = components.base_dist.loc[:, 0], components.base_dist.scale[:, 0]
        torch.testing.assert_close(prior().log_prob(z), dist.Normal(loc, scale).log_prob(z).exp().mean(-1).log())
        draws = prior().sample((4000,))
        nearest = (draws - loc).abs().argmin(-1)
        counts = nearest.bincount(minlength=4).double()
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 21.1  # chi-squared, 3 degrees of freedom, p = 1e-4


class Counting(torch.nn.Module):
    """A posterior that counts how often it is asked, with dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        layers = (torch.nn.Linear(FEATURES, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
        self.inner = posteriors.DiagonalNormal(torch.nn.Sequential(*layers))
        self.calls = 0

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        self.calls += 1
        return self.inner(x)


CHANGES = {
    "an optimizer's step": lambda p: step(p, torch.optim.Adam),
    "a fused optimizer's step": lambda p: step(p, lambda ps, lr: torch.optim.Adam(ps, lr=lr, fused=True)),
    "a change that no version counter sees": lambda p: p.posterior.inner.net[0].weight.data.add_(0.1),
    "another tensor in its place": lambda p: setattr(p.pseudo_inputs, "data", p.pseudo_inputs.data + 0.1),
    "loading a state": lambda p: p.load_state_dict({k: v + 1 for k, v in p.state_dict().items()}),
    "a buffer": lambda p: p.posterior.inner.net[1].running_mean.add_(0.5),
    "another dtype": lambda p: p.double(),
}


def step(prior: priors.VampPrior, optimizer: Any) -> None:
    for p in prior.parameters():
        p.grad = torch.randn_like(p)
    optimizer(list(prior.parameters()), lr=0.1).step()


@pytest.mark.parametrize("change", CHANGES)
def test_vamp_keeps_its_components_until_something_changes(change: str) -> None:
    torch.manual_seed(0)
    prior = priors.VampPrior(Counting(), torch.rand(3, FEATURES)).eval()
    z = torch.randn(5, 2)
    with torch.no_grad():
        first = prior().log_prob(z)
        torch.testing.assert_close(prior().log_prob(z), first, rtol=0, atol=0)
    assert prior.posterior.calls == 1
    CHANGES[change](prior)
    with torch.no_grad():
        now = prior().log_prob(z.to(prior.pseudo_inputs.dtype))
    anew = prior().log_prob(z.to(prior.pseudo_inputs.dtype))  # with gradients, nothing is kept
    torch.testing.assert_close(now, anew.detach(), rtol=0, atol=0)
    assert prior.posterior.calls == 3
    assert change == "another dtype" or not torch.equal(now, first)


def test_vamp_goes_into_a_graph_as_it_stands() -> None:
    torch.manual_seed(0)
    prior = priors.VampPrior(Counting(), torch.rand(3, FEATURES)).eval()
    z = torch.randn(5, 2)
    with torch.no_grad(), pyro.validation_enabled(False):
        prior().log_prob(z)
        graph = graphs.capture(lambda: [prior().log_prob(z)], list(prior.parameters()), (z,))
    assert not graph.read
    step(prior, torch.optim.Adam)
    with torch.no_grad():
        torch.testing.assert_close(graph(z)[0], prior().log_prob(z))
        once, each = graph.split(0)  # the components do not depend on z
    assert any("mm" in str(n.target) for n in once.graph.nodes)
    assert not any("mm" in str(n.target) for n in each.graph.nodes)


def test_vamp_keeps_nothing_in_training_and_runs_in_the_posteriors_mode() -> None:
    torch.manual_seed(0)
    prior = priors.VampPrior(Counting(), torch.rand(3, FEATURES))
    z = torch.zeros(1, 2)
    with torch.no_grad():
        dropped = {round(prior().log_prob(z).item(), 5) for _ in range(10)}
    assert prior.posterior.calls == 10
    assert len(dropped) > 1, "the posterior drops out in training, and so does the prior"
    prior.eval()
    with torch.no_grad():
        kept = prior().log_prob(z)
    for _ in range(2):  # what was kept has no gradient, and a graph serves once
        value = prior().log_prob(z)
        assert value.item() == kept.item()
        value.backward()


def test_vamp_starts_from_data() -> None:
    x = torch.rand(20, FEATURES)
    prior = priors.VampPrior.from_data(posteriors.Delta(nn.mlp(FEATURES, 2)), x, components=20, noise=0.0)
    assert sorted(prior.pseudo_inputs.tolist()) == sorted(x.tolist())
    train = data.load("digits", binarize="dynamic")[0]
    some = priors.VampPrior.from_data(posteriors.Delta(nn.mlp(64, 2)), train, components=7, noise=0.1)
    assert type(some.pseudo_inputs.data) is Tensor
    assert 0.05 < (some.pseudo_inputs - some.pseudo_inputs.round()).std() < 0.15
    with pytest.raises(ValueError, match="20"):
        priors.VampPrior.from_data(posteriors.Delta(nn.mlp(FEATURES, 2)), x, components=21)
    with pytest.raises(ValueError, match="context"):
        priors.VampPrior(posteriors.PerDatum(5, 4), x)


@pytest.mark.parametrize("family", ["FullRank", "LowRank", "IAF", "SplineCoupling"])
def test_vamp_takes_any_posterior(family: str) -> None:
    torch.manual_seed(0)
    posterior = {
        "FullRank": lambda: posteriors.FullRank(nn.mlp(FEATURES, 5)),
        "LowRank": lambda: posteriors.LowRank(nn.mlp(FEATURES, 6), rank=1),
        "IAF": lambda: posteriors.IAF(nn.mlp(FEATURES, 7), 2, features=3),
        "SplineCoupling": lambda: posteriors.SplineCoupling(nn.mlp(FEATURES, 7), 2, features=3),
    }[family]()  # fmt: skip
    posterior = perturbed(posterior, 0.1)
    prior = priors.VampPrior(posterior, torch.rand(3, FEATURES).double())
    z = torch.randn(5, 2).double()
    parts = torch.stack([posterior(u).log_prob(z) for u in prior.pseudo_inputs])
    torch.testing.assert_close(prior().log_prob(z), parts.exp().mean(0).log())
    vae = VAE(prior, likelihoods.Bernoulli(decoder(2)).double(), posterior)
    x = (torch.rand(6, FEATURES) > 0.5).double()
    t = terms(vae.model, vae.guide, x, num_particles=3)
    t.log_weight.sum().backward()
    assert prior.pseudo_inputs.grad is not None
    assert inspect(vae.model, vae.guide, x).layout == "vectorized"


def test_vamp_shares_its_posterior_with_the_guide(tmp_path: Any) -> None:
    """Each shared parameter is registered under two names, trained once a step, saved, resumed and evaluated."""

    def pair() -> VAE:
        torch.manual_seed(0)
        posterior = posteriors.DiagonalNormal(nn.mlp(FEATURES, 4, hidden=(6,)))
        prior = priors.VampPrior.from_data(posterior, x, components=5)
        return VAE(prior, likelihoods.Bernoulli(decoder(2)), posterior)

    x = (torch.rand(60, FEATURES, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    whole, halves = pair(), pair()
    run = fit(whole.model, whole.guide, x, valid=x, epochs=4, batch_size=20, seed=0, progress=False)
    assert len(list(whole.parameters())) == 9  # pseudo-inputs, and two layers of weight and bias in each network
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    fit(halves.model, halves.guide, x, valid=x, epochs=2, batch_size=20, directory=tmp_path, progress=False)
    again = pair()
    fit(again.model, again.guide, x, valid=x, epochs=4, batch_size=20, directory=tmp_path, resume=True, progress=False)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    est = log_marginal(run.model, run.guide, x, num_particles=200, progress=False, proposal="guide")
    assert est.log_px.isfinite().all()
    assert est.nll == pytest.approx(
        log_marginal(whole.model, whole.guide, x, num_particles=200, progress=False, proposal="guide").nll
    )


def test_autoregressive_classes_start_uniform_and_use_what_came_before() -> None:
    fn = priors.AutoregressiveCategorical(3, variables=2)()
    torch.testing.assert_close(fn.log_prob(fn.enumerate_support()), torch.full((9,), -math.log(9)))
    torch.manual_seed(0)
    prior = perturbed(priors.AutoregressiveCategorical(3, variables=2, hidden=(8,)), by=0.7)
    joint = prior().log_prob(prior().enumerate_support()).exp().reshape(3, 3)
    assert not torch.allclose(joint, joint.sum(1, keepdim=True) * joint.sum(0), atol=1e-3), "not independent"
    one_hot = priors.AutoregressiveOneHot(3, variables=2).double()
    one_hot.index = prior
    z = torch.tensor([[0.0, 1, 0, 0, 0, 1]]).double()
    torch.testing.assert_close(one_hot().log_prob(z), prior().log_prob(torch.tensor([[1, 2]])))


@pytest.mark.parametrize("prior", [priors.Bernoulli(17), priors.Categorical(3, 11), priors.AutoregressiveOneHot(2, 17)])
def test_too_many_joint_values_are_not_enumerated(prior: torch.nn.Module) -> None:
    assert not prior().has_enumerate_support
    assert prior().support.is_discrete
    with pytest.raises(NotImplementedError, match="65536"):
        prior().enumerate_support()


def test_discrete_priors_are_what_their_logits_say() -> None:
    prior = perturbed(priors.Categorical(3, variables=2, learned=True))
    probs = prior.logits.softmax(-1)
    torch.testing.assert_close(prior().log_prob(torch.tensor([2, 0])), (probs[0, 2] * probs[1, 0]).log())
    one_hot = priors.OneHot(3, 2, learned=True).double()
    one_hot.load_state_dict(prior.state_dict())
    torch.testing.assert_close(
        one_hot().log_prob(torch.tensor([0.0, 0, 1, 1, 0, 0])), (probs[0, 2] * probs[1, 0]).log()
    )
    some = torch.tensor([[0.0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0.5, 1, 0, 0]])
    assert one_hot().support.check(some).tolist() == [True, False, False]
    binary = perturbed(priors.Bernoulli(2, learned=True))
    probs = binary.logits.sigmoid()
    torch.testing.assert_close(binary().log_prob(torch.tensor([1.0, 0.0]).double()), (probs[0] * (1 - probs[1])).log())


@pytest.mark.parametrize("logit", [-400.0, -90.0, -3.0, 0.0, 20.0, 100.0, 400.0])
@pytest.mark.parametrize("z", [1e-30, 1e-3, 0.5, 0.9])
def test_relaxed_bernoulli_is_right_at_any_logit(logit: float, z: float) -> None:
    mpmath.mp.dps = 400
    t, logit_, z_ = mpmath.mpf("0.5"), mpmath.mpf(logit), mpmath.mpf(z)
    alpha = mpmath.exp(logit_)
    density = t * alpha * z_ ** (-t - 1) * (1 - z_) ** (-t - 1) / (alpha * z_**-t + (1 - z_) ** -t) ** 2
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = BinaryConcrete(torch.tensor(0.5, dtype=dtype), torch.tensor(logit, dtype=dtype)).log_prob(
            torch.tensor(z, dtype=dtype)
        )
        assert got.item() == pytest.approx(float(mpmath.log(density)), rel=rtol, abs=1e-5)


def test_relaxed_densities_are_pyros_where_those_are_right() -> None:
    torch.manual_seed(0)
    t, logits = torch.tensor(0.7).double(), torch.randn(5, 3).double()
    z = torch.rand(5, 3).double()
    torch.testing.assert_close(
        BinaryConcrete(t, logits).log_prob(z), dist.RelaxedBernoulli(t, logits=logits).log_prob(z)
    )  # fmt: skip
    z = torch.randn(5, 3).double().softmax(-1)
    torch.testing.assert_close(
        Concrete(t, logits[:, None]).log_prob(z), dist.RelaxedOneHotCategorical(t, logits=logits).log_prob(z)
    )
    two = Concrete(t, logits.reshape(5, 1, 3).expand(5, 2, 3))
    both = torch.cat([z, z.flip(0)], -1)
    single = Concrete(t, logits[:, None])
    torch.testing.assert_close(two.log_prob(both), single.log_prob(z) + single.log_prob(z.flip(0)))


def test_relaxed_densities_are_finite_at_the_corners() -> None:
    t = torch.tensor(0.5)
    assert bool(BinaryConcrete(t, torch.zeros(2)).log_prob(torch.tensor([0.0, 1.0])).isfinite().all())
    assert bool(Concrete(t, torch.zeros(1, 3)).log_prob(torch.tensor([0.0, 1.0, 0.0])).isfinite())


@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
def test_relaxed_draws_stay_inside_and_finite(temperature: float) -> None:
    torch.manual_seed(0)
    for fn in (
        BinaryConcrete(torch.tensor(temperature), torch.linspace(-100, 100, 9).requires_grad_()).to_event(1),
        Concrete(torch.tensor(temperature), torch.linspace(-100, 100, 9).reshape(3, 3).requires_grad_()),
    ):
        z = fn.rsample((1000,))
        assert bool(fn.support.check(z).all())
        assert bool((z > 0).all())
        fn.log_prob(z).sum().backward()
        logits = fn.base_dist.logits if hasattr(fn, "base_dist") else fn.logits
        assert bool(fn.log_prob(z).isfinite().all())
        assert logits.requires_grad


def test_relaxed_priors_share_their_logits_with_the_discrete_ones() -> None:
    for relaxed in (priors.RelaxedBernoulli(4, learned=True), priors.RelaxedOneHot(2, 2, learned=True)):
        assert [p is q for p, q in zip(relaxed.parameters(), relaxed.discrete.parameters(), strict=True)] == [True]
    with pytest.raises(ValueError, match="temperature"):
        priors.RelaxedBernoulli(4, temperature=0.0)


@pytest.mark.parametrize("elements", [2, 3, 4, 7])
def test_uniform_on_the_sphere_is_one_over_its_area(elements: int) -> None:
    area = {2: 2 * math.pi, 3: 4 * math.pi, 4: 2 * math.pi**2, 7: 16 * math.pi**3 / 15}[elements]
    fn = priors.UniformOnSphere(elements).double()()
    assert fn.log_prob(fn.sample()).item() == pytest.approx(-math.log(area), rel=1e-12)
    assert bool(priors.UniformOnSphere(elements)().expand([100_000]).sample().norm(dim=-1).sub(1).abs().max() < 1e-6)


def test_logistic_normal_is_the_dense_normal_of_log_ratios() -> None:
    torch.manual_seed(0)
    prior = perturbed(priors.LogisticNormal(4))
    z = torch.randn(6, 4).double().softmax(-1)
    scale2 = (2 * prior.log_scale).exp()
    covariance = torch.diag(scale2[:3]) + scale2[3]
    ratios = (z[:, :3] / z[:, 3:]).log()
    dense = dist.MultivariateNormal(prior.loc[:3] - prior.loc[3], covariance).log_prob(ratios) - z.log().sum(-1)
    torch.testing.assert_close(prior().log_prob(z), dense)
    with torch.no_grad():
        before = prior().log_prob(z)
        prior.loc.add_(5.0)
        torch.testing.assert_close(prior().log_prob(z), before)


def test_logistic_normal_like_a_dirichlet() -> None:
    torch.manual_seed(0)
    near = priors.LogisticNormal.like_dirichlet(5, 4.0).double()().sample((200_000,))
    exact = priors.Dirichlet(5, 4.0).double()().sample((200_000,))
    torch.testing.assert_close(near.mean(0), exact.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(near.std(0), exact.std(0), atol=1e-2, rtol=0)


def test_draws_on_a_large_simplex_are_in_its_support() -> None:
    torch.manual_seed(0)
    for prior in (priors.Dirichlet(3000, 0.1), priors.LogisticNormal(3000)):
        z = prior().sample((300,))
        assert bool(prior().support.check(z).all())
        assert bool(prior().log_prob(z).isfinite().all())


def test_conditional_normal_is_its_row() -> None:
    torch.manual_seed(0)
    prior = perturbed(priors.ConditionalNormal.of_labels(4, latent=2))
    z, label = torch.randn(3, 2).double(), torch.tensor([2, 0, 3])
    loc, log_scale = prior.net.weight[label].chunk(2, -1)
    torch.testing.assert_close(
        prior(context=label).log_prob(z), dist.Normal(loc, log_scale.exp()).to_event(1).log_prob(z)
    )


@pytest.mark.parametrize(
    "kernel", [gaussian_process.rbf, gaussian_process.matern12, gaussian_process.matern32, gaussian_process.cauchy]
)
def test_gaussian_process_is_the_dense_normal(kernel: Any) -> None:
    torch.manual_seed(0)
    prior = perturbed(priors.GaussianProcess(2, lengthscale=0.7, kernel=kernel, jitter=1e-3))
    places = torch.rand(3, 5).double()
    z = torch.randn(3, 10).double()
    fn = prior(context=places)
    assert (fn.batch_shape, fn.event_shape) == ((3,), (10,))
    value = fn.log_prob(z)
    for i in range(3):
        r = (places[i][:, None] - places[i][None]).abs()
        total = torch.tensor(0.0).double()
        for d in range(2):
            length = prior.log_lengthscale[d].exp()
            form = {
                gaussian_process.rbf: (-((r / length) ** 2) / 2).exp(),
                gaussian_process.matern12: (-r / length).exp(),
                gaussian_process.matern32: (1 + 3**0.5 * r / length) * (-(3**0.5) * r / length).exp(),
                gaussian_process.cauchy: 1 / (1 + (r / length) ** 2),
            }[kernel]
            covariance = form + 1e-3 * torch.eye(5)
            total = total + dist.MultivariateNormal(torch.zeros(5).double(), covariance).log_prob(
                z[i].reshape(5, 2)[:, d]
            )
        torch.testing.assert_close(value[i], total)


def test_gaussian_process_shares_positions_and_takes_points() -> None:
    torch.manual_seed(0)
    prior, z = perturbed(priors.GaussianProcess(2)), torch.randn(3, 10).double()
    places = torch.rand(1, 5).double().expand(3, 5)
    shared = prior(context=places)
    assert shared.batch_shape == ()
    apart = places.clone()
    apart[0] += 1.0  # a stationary kernel does not see a shift
    torch.testing.assert_close(shared.log_prob(z), prior(context=apart).log_prob(z))
    plane = torch.stack([places, torch.zeros_like(places)], -1)
    torch.testing.assert_close(prior(context=plane).log_prob(z), shared.log_prob(z))
    draws = shared.sample((20_000,)).reshape(-1, 5, 2)
    r = (places[0][:, None] - places[0][None]).abs()
    expected = (-((r / prior.log_lengthscale[1].exp()) ** 2) / 2).exp()
    torch.testing.assert_close(draws[..., 1].T.cov(), expected.detach(), atol=0.05, rtol=0)
    assert bool((draws[..., 0].T @ draws[..., 1] / 20_000).abs().max() < 0.05), "dims are independent"


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: priors.Laplace(2, scale=0.0), "scale"), (lambda: priors.StudentT(2, df=-1.0), "df"),
        (lambda: priors.MixtureOfNormals(2, 0), "components"), (lambda: priors.UniformOnSphere(1), "latent"),
        (lambda: priors.Dirichlet(2, 0.0), "concentration"), (lambda: priors.GaussianProcess(2, jitter=0.0), "jitter"),
        (lambda: priors.LogisticNormal.like_dirichlet(2, -1.0), "concentration"),
        (lambda: priors.Autoregressive(2, components=0), "components"),
    ],
)  # fmt: skip
def test_refuses_a_bad_argument(build: Any, word: str) -> None:
    with pytest.raises(ValueError, match=f"{word}: expected"):
        build()


def test_every_prior_is_under_the_laws() -> None:
    assert {n.split()[0] for n in PRIORS} == set(priors.__all__)


def test_flow_is_known_by_its_name_and_shape() -> None:
    fn = ZukoDistribution(zuko.flows.MAF(3)())
    assert (type(fn).__name__, fn.shape(), fn.support.event_dim) == ("ZukoDistribution", torch.Size([3]), 1)
