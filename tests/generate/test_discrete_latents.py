"""Traversals of discrete latents go through their values; a continuous latent beside them is taken by default."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import VAE, fit, generate, likelihoods, load, log_marginal, nn, posteriors, priors, report
from ppvae.errors import UsageError
from ppvae.evaluation.evidence.refined import with_bracket
from ppvae.inference import from_param_store
from ppvae.models import SemiSupervisedVAE
from ppvae.objectives import ELBO
from ppvae.training import Run

X = torch.rand(6, 64, generator=torch.Generator().manual_seed(0)).round()
LABEL = torch.tensor([3, -1, 0, 2, -1, 1])


def semi_supervised() -> SemiSupervisedVAE:
    torch.manual_seed(0)
    return SemiSupervisedVAE(
        priors.OneHot(4), priors.StandardNormal(2), likelihoods.Bernoulli(nn.mlp(2 + 4, 64)),
        posteriors.DiagonalNormal(nn.mlp(64 + 4, 4)), posteriors.OneHot(nn.mlp(64, 4), 4),
    )  # fmt: skip


def vae_of(prior, posterior, width: int) -> VAE:
    torch.manual_seed(0)
    return VAE(prior, likelihoods.Bernoulli(nn.mlp(width, 64)), posterior)


@pytest.mark.parametrize("batch", [(X, LABEL), X], ids=["labels", "no labels"])
def test_a_one_hot_latent_goes_through_its_classes(batch):
    pair = semi_supervised()
    found = generate.traversals(pair.model, pair.guide, batch, site="y")
    z = generate.posterior_means(pair.model, pair.guide, batch)["z"][:1]
    for c in range(4):
        y = torch.eye(4)[c : c + 1]
        torch.testing.assert_close(found[0, c], pair.eval().likelihood(z, context=y).mean[0].detach())
    assert found.shape == (1, 4, 64)


def test_the_continuous_latent_is_the_default():
    pair = semi_supervised()
    default, z = (generate.traversals(pair.model, pair.guide, (X, LABEL), site=site) for site in (None, "z"))
    assert default.shape == (2, 7, 64)
    assert torch.equal(default, z)


@pytest.mark.parametrize("name", ["bits", "several one-hot vectors"])
def test_vectors_of_discrete_variables(name):
    if name == "bits":
        pair = vae_of(priors.Bernoulli(3), posteriors.Bernoulli(nn.mlp(64, 3)), 3)
        found = generate.traversals(pair.model, pair.guide, X)
        start = generate.posterior_means(pair.model, pair.guide, X)["z"][0]
        values = torch.stack([torch.cat([start[:1], torch.tensor([v]), start[2:]]) for v in (0.0, 1.0)])
        torch.testing.assert_close(found[1], pair.likelihood(values).mean.detach())
        assert found.shape == (3, 2, 64)
    else:
        pair = vae_of(priors.OneHot(2, 2), posteriors.OneHot(nn.mlp(64, 4), 2), 4)
        assert generate.traversals(pair.model, pair.guide, X).shape == (1, 4, 64)


def test_a_latent_without_a_list_of_values_is_refused_in_one_sentence():
    pair = vae_of(priors.OneHot(2, 8), posteriors.OneHot(nn.mlp(64, 16), 2), 16)
    with pytest.raises(UsageError, match=r"'z' is discrete and has no list of at most 100 values"):
        generate.traversals(pair.model, pair.guide, X)

    def counted(x):
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Poisson(torch.ones(len(x))))
            pyro.sample("x", dist.Normal(n[:, None].expand(-1, 3), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("n", dist.Poisson(torch.ones(len(x))))

    with pytest.raises(UsageError, match="'n' is discrete"):
        generate.traversals(counted, guide, torch.zeros(4, 3))


def test_the_report_of_a_semi_supervised_vae_has_every_figure(tmp_path, caplog):
    pair = semi_supervised()
    run = Run(*from_param_store(pair.model, pair.guide), history=[])
    page = report.write(run, data=(X, LABEL), directory=tmp_path).read_text()
    assert "could not be drawn" not in page + caplog.text
    assert {"traversals.png", "traversals_2.png"} <= {path.name for path in (tmp_path / "pictures").iterdir()}
    assert '"site":"z"' in page
    assert "discrete latent y goes through its values" in page


def test_the_note_on_a_pair_without_a_bracket_ends_with_what_is_true_of_it():
    pair = semi_supervised()
    est = log_marginal(pair.model, pair.guide, X, num_particles=20, proposal="guide")
    (note,) = [n for n in with_bracket(est, pair.model, pair.guide, X, 4).notes if n.startswith("no bracket")]
    assert note.rstrip(".").endswith("if the pair is your own; log p(x) stands without a bracket"), note


def test_a_loaded_run_classifies(tmp_path):
    pair = semi_supervised()
    fit(pair.model, pair.guide, (X, LABEL), objective=ELBO(), epochs=1, directory=tmp_path / "run")
    trained = pair.classify(X)
    again = semi_supervised()
    assert not torch.equal(again.classify(X), trained)
    assert torch.equal(load(tmp_path / "run", again.model, again.guide).pair.classify(X), trained)
    plain = Run(*from_param_store(lambda x: None, lambda x: None), history=[])
    with pytest.raises(UsageError, match="pair: expected a model that is the method of an object"):
        _ = plain.pair
