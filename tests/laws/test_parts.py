"""Laws of conditionals together: what a part that declares a context is given, and what says why it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import VAE, data, fit, likelihoods, load, log_marginal, nn, posteriors, priors, terms
from ppvae.cli.main import main
from ppvae.errors import ContractError, UsageError
from ppvae.inference import check
from ppvae.nn.context import needs_context, takes_context
from tests.laws.parts import PRIORS

LATENT, FEATURES, LABELS = 3, 6, 2


class Labelled(torch.nn.Module):
    """A network (values, label) -> outputs; without a label it takes the first, if it may."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.net, self.shift = nn.mlp(inputs, outputs, hidden=(8,)), torch.nn.Embedding(LABELS, outputs)

    def forward(self, values: Tensor, *, context: Tensor) -> Tensor:
        return self.net(values) + self.shift(context)


class Optional(Labelled):
    def forward(self, values: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(
            values, context=torch.zeros(len(values), dtype=torch.long) if context is None else context
        )


class Decoder(torch.nn.Module):
    """A likelihood that is given the label."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Labelled(LATENT, FEATURES)

    def forward(self, z: Tensor, context: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.net(z, context=context)).to_event(1)


def decoder() -> likelihoods.Bernoulli:
    return likelihoods.Bernoulli(nn.mlp(LATENT, FEATURES, hidden=(8,)))


def encoder() -> posteriors.DiagonalNormal:
    return posteriors.DiagonalNormal(nn.mlp(FEATURES, 2 * LATENT, hidden=(8,)))


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    noise = torch.rand(count, FEATURES, generator=torch.Generator().manual_seed(1))
    return (noise > 0.5).float(), torch.arange(count) % LABELS


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_a_part_that_declares_context_gets_the_second_tensor() -> None:
    prior = priors.ConditionalNormal.of_labels(LABELS, LATENT)
    vae, (x, label) = VAE(prior, decoder(), encoder()), batch()
    t = terms(vae.model, vae.guide, (x, label), num_particles=3)
    rows = prior.net.weight[label]
    expected = dist.Normal(rows[:, :LATENT], rows[:, LATENT:].exp()).to_event(1)
    torch.testing.assert_close(t.model["z"].log_prob, expected.log_prob(t.model["z"].value))
    with pytest.raises(UsageError, match="ConditionalNormal: expected a context"):
        vae.model(x)


def test_a_context_with_a_default_may_be_left_out() -> None:
    x, label = batch()
    vae = VAE(priors.StandardNormal(LATENT), decoder(), posteriors.DiagonalNormal(Optional(FEATURES, 2 * LATENT)))
    assert (takes_context(vae.posterior), needs_context(vae.posterior)) == (True, False)
    for given, expected in (((x,), torch.zeros_like(label)), ((x, label), label)):
        q = vae.posterior.head(vae.posterior.net(x, expected))
        site = terms(vae.model, vae.guide, given, num_particles=3).guide["z"]
        torch.testing.assert_close(site.log_prob, q.log_prob(site.value))
    fit(vae.model, vae.guide, x, epochs=1, progress=False)


def test_a_network_that_declares_context_gets_it_from_its_posterior() -> None:
    x, label = batch()
    vae = VAE(priors.StandardNormal(LATENT), decoder(), posteriors.DiagonalNormal(Labelled(FEATURES, 2 * LATENT)))
    assert needs_context(vae.posterior)
    assert not needs_context(encoder())
    first, other = (
        terms(vae.model, vae.guide, (x, c), 1, values={"z": torch.zeros(1, 8, LATENT)}) for c in (label, 1 - label)
    )
    assert not torch.isclose(first.log_guide, other.log_guide).any()
    with pytest.raises(UsageError, match="Labelled: expected a context"):
        terms(vae.model, vae.guide, x, 1)


@pytest.mark.parametrize("through", [True, False])
def test_semi_amortized_hands_the_context_to_every_part(through: bool) -> None:
    x, label = batch()
    prior, likelihood = priors.ConditionalNormal.of_labels(LABELS, LATENT), Decoder()
    network = Labelled(FEATURES, 2 * LATENT)
    posterior = posteriors.SemiAmortized(network, prior, likelihood, steps=3, through=through)
    assert needs_context(posterior)
    vae = VAE(prior, likelihood, posterior)
    t = terms(vae.model, vae.guide, (x, label), num_particles=4)
    assert bool(t.log_weight.isfinite().all())
    for which in range(LABELS):  # one label at a time, by parts that know no other
        alone = posteriors.SemiAmortized(
            Fixed(network, which),
            FixedPrior(prior, which),
            likelihoods.Bernoulli(Fixed(likelihood.net, which)),
            steps=3,
        )
        rows = label == which
        ours, theirs = posterior(x[rows], context=label[rows]).base_dist, alone(x[rows]).base_dist
        torch.testing.assert_close(ours.loc, theirs.loc)
        torch.testing.assert_close(ours.scale, theirs.scale)
    run = fit(vae.model, vae.guide, (x, label), epochs=2, progress=False)
    assert bool(
        log_marginal(run.model, run.guide, (x, label), num_particles=20, progress=False, proposal="guide")
        .log_px.isfinite()
        .all()
    )


class Fixed(torch.nn.Module):
    """A labelled network of one label."""

    def __init__(self, net: torch.nn.Module, label: int):
        super().__init__()
        self.net, self.label = net, label

    def forward(self, values: Tensor) -> Tensor:
        return self.net(values, context=torch.tensor(self.label))


class FixedPrior(torch.nn.Module):
    def __init__(self, prior: torch.nn.Module, label: int):
        super().__init__()
        self.prior, self.label = prior, label

    def forward(self) -> dist.TorchDistribution:
        return self.prior(context=torch.tensor(self.label))


@pytest.mark.parametrize("real", [True, False])
def test_vamp_prior_of_a_posterior_with_context(real: bool) -> None:
    x, label = batch()
    if real:
        net: torch.nn.Module = Concatenated(FEATURES + 1, 2 * LATENT)
        given = label[:, None].float()
    else:
        net, given = Labelled(FEATURES, 2 * LATENT), label
    posterior = posteriors.DiagonalNormal(net)
    prior = priors.VampPrior.from_data(posterior, x, components=4, noise=0.0, context=given)
    vae = VAE(prior, decoder(), posterior)
    z = torch.randn(5, LATENT)
    parts = [
        posterior(u[None], context=c[None]).log_prob(z) for u, c in zip(prior.pseudo_inputs, prior.context, strict=True)
    ]
    torch.testing.assert_close(prior().log_prob(z), torch.stack(parts).exp().mean(0).log())
    rows = [
        bool(((x == u).all(-1) & (given == c).reshape(len(x), -1).all(-1)).any())
        for u, c in zip(prior.pseudo_inputs, prior.context, strict=True)
    ]
    assert all(rows), "each pseudo-input has its own row's context"
    assert isinstance(prior.context, torch.nn.Parameter) == real
    fit(vae.model, vae.guide, (x, given), epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"VampPrior: expected a context for each pseudo-input.*DiagonalNormal"):
        priors.VampPrior(posterior, x)
    with pytest.raises(ValueError, match="expected a context for each of 8"):
        priors.VampPrior(posterior, x, given[:3])


class Concatenated(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.net = nn.mlp(inputs, outputs, hidden=(8,))

    def forward(self, values: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat([values, context], -1))


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("moment", ["mean", "mode", "variance"])
def test_a_moment_is_known_or_a_sentence_says_that_it_has_no_closed_form(name: str, moment: str) -> None:
    case = PRIORS[name]
    fn = case.make(case.size)(**case.given())
    try:
        shape, sentence = getattr(fn, moment).shape, "a closed form"
    except NotImplementedError as error:
        shape, sentence = fn.shape(), str(error)
    assert shape == fn.shape()
    assert "closed form" in sentence


# ---------------------------------------------------------------------------------------- what does not fit together


def test_parts_of_other_sizes_are_named() -> None:
    x, _ = batch()
    cases = [
        (
            VAE(priors.StandardNormal(2), decoder(), encoder()),
            r"prior StandardNormal .* DiagonalNormal .*\[2\] and \[3\]",
        ),
        (
            VAE(priors.StandardNormal(3), likelihoods.Bernoulli(nn.mlp(2, 6)), encoder()),
            r"Bernoulli does not take z of.*\[8, 3\]",
        ),
        (
            VAE(priors.StandardNormal(3), likelihoods.Bernoulli(nn.mlp(3, 5)), encoder()),
            r"Bernoulli does not fit.*\[6\].*\[5\]",
        ),
        (
            VAE(priors.StandardNormal(3), decoder(), posteriors.DiagonalNormal(nn.mlp(5, 6))),
            r"DiagonalNormal does not take data",
        ),
    ]
    for vae, words in cases:
        with pytest.raises(ContractError, match=words):
            vae.guide(x)


def test_looking_for_a_fit_leaves_no_trace() -> None:
    x, _ = batch()
    parts = (priors.StandardNormal(LATENT), torch.nn.BatchNorm1d(FEATURES), torch.nn.Linear(FEATURES, 2 * LATENT))
    vae = VAE(parts[0], decoder(), posteriors.DiagonalNormal(torch.nn.Sequential(*parts[1:])))
    state = torch.get_rng_state()
    with torch.no_grad():
        expected = vae.posterior.eval()(x)
        vae.eval()
        first = vae.guide(x)
        torch.set_rng_state(state)
        torch.testing.assert_close(vae.guide(x), first)
        torch.set_rng_state(state)
        torch.testing.assert_close(expected.sample(), first)
    fresh = VAE(vae.prior, vae.likelihood, vae.posterior).train()
    fresh.guide(x)
    assert int(parts[1].num_batches_tracked) == 1
    assert all(m.training for m in fresh.modules())


# --------------------------------------------------------------------------------------- relaxed and discrete models


def test_the_command_line_reports_the_discrete_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--prior", "Bernoulli", "--posterior", "RelaxedBernoulli", "--latent", "3", "--hidden", "8"]
    where = ["--runs", str(tmp_path), "--name", "relaxed", "--epochs", "1", "--no-report"]
    assert main(["fit", "ppvae.models:vae", *chosen, *where]) == 0
    assert main(["evaluate", str(tmp_path / "relaxed"), "--num-particles", "400", "--head", "20", "--no-report"]) == 0
    assert "discrete model, whose relaxed counterpart was trained" in capsys.readouterr().out
    vae = load(tmp_path / "relaxed").model.function.__self__
    test = data.load("digits", binarize="fixed")[2][:20]
    found = json.loads((tmp_path / "relaxed" / "results" / "log_marginal.json").read_text())["per_datum"]
    for pair, same in ((vae.discrete, True), (vae, False)):
        est = log_marginal(pair.model, pair.guide, test, num_particles=400, progress=False, proposal="guide")
        assert torch.allclose(est.log_px, torch.tensor(found["log_px"]).double()) == same


@pytest.mark.parametrize("fn", [dist.RelaxedBernoulli, dist.RelaxedOneHotCategorical])
def test_pyros_relaxed_distributions_are_told_too(fn: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", made())
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", made())

    def made() -> Any:
        one = fn(torch.tensor(0.7), logits=torch.zeros(2))
        return one if one.event_shape else one.to_event(1)

    x = torch.randn(5)
    assert "'z' is a relaxed discrete latent" in check(model, guide, x)
    assert (
        "'z' is a relaxed discrete latent"
        in log_marginal(model, guide, x, num_particles=3, progress=False, proposal="guide").notes[-1]
    )


def test_two_vaes_never_share_a_name() -> None:
    parts = [VAE(priors.StandardNormal(LATENT), decoder(), encoder()) for _ in range(2)]
    assert parts[0]._name != parts[1]._name
