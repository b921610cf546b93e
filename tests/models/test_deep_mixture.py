"""Conditional and semi-supervised VAEs and deep mixtures against sums over classes, quadrature, and one another."""

from __future__ import annotations

import functools
import math
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from ppvae import VAE, check, fit, likelihoods, log_marginal, nn, objectives, posteriors, priors, terms
from ppvae.data import with_missing
from ppvae.errors import DataError, PpvaeError, UsageError
from ppvae.models import ConditionalVAE, DeepMixture, SemiSupervisedVAE
from ppvae.objectives.auxiliary import AuxiliaryLoss

pytestmark = pytest.mark.usefixtures("float64")
LATENT, FEATURES, CLASSES = 1, 5, 3


def likelihood(inputs: int) -> likelihoods.Bernoulli:
    return likelihoods.Bernoulli(nn.mlp(inputs, FEATURES, hidden=(7,)))


def posterior(inputs: int) -> posteriors.DiagonalNormal:
    return posteriors.DiagonalNormal(nn.mlp(inputs, 2 * LATENT, hidden=(7,)))


def semi_supervised() -> SemiSupervisedVAE:
    labels = priors.OneHot(CLASSES, learned=True)
    made = SemiSupervisedVAE(
        labels, priors.StandardNormal(LATENT), likelihood(LATENT + CLASSES), posterior(FEATURES + CLASSES),
        posteriors.OneHot(nn.mlp(FEATURES, CLASSES), CLASSES),
    )  # fmt: skip
    torch.nn.init.normal_(labels.logits)
    return made


def conditional_of(vae: SemiSupervisedVAE) -> ConditionalVAE:
    return ConditionalVAE(vae.prior, vae.likelihood.module, vae.posterior.module, nn.Labels(CLASSES))


def data(rows: int = 6) -> Tensor:
    return torch.rand(rows, FEATURES).lt(0.5).double()


def log_joint(vae: SemiSupervisedVAE, x: Tensor) -> Tensor:
    """log p(x, y) of every class by Gauss-Hermite quadrature over z, [batch, classes]."""
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    z, mass = torch.tensor(node)[:, None, None, None], torch.tensor(weight / weight.sum())[:, None, None]
    y = torch.eye(CLASSES)
    inputs = torch.cat([z.expand(60, 1, CLASSES, 1), y.expand(60, 1, CLASSES, CLASSES)], -1)
    log_lik = torch.distributions.Bernoulli(logits=vae.likelihood.module.net(inputs)).log_prob(x[:, None]).sum(-1)
    return (log_lik + mass.log()).logsumexp(0) + vae.clusters.logits[0].log_softmax(-1)


def test_log_px_sums_the_label_out_and_a_label_picks_its_class():
    vae, x = semi_supervised(), data()
    with torch.no_grad():  # a guide near the prior: the weights are as bounded as the likelihood is
        for p in vae.posterior.parameters():
            p.mul_(0.3)
    label = torch.tensor([0, -1, 2, -1, 1, -1])
    exact = log_joint(vae, x).detach()
    each = torch.where(label < 0, exact.logsumexp(-1), exact[torch.arange(6), label.clamp(min=0)])
    for batch, expected in ((x, exact.logsumexp(-1)), ((x, label), each)):
        est = log_marginal(vae.model, vae.guide, batch, num_particles=6000, seed=1, progress=False, proposal="guide")
        assert bool(est.reliable.all())
        assert bool(((est.log_px - expected).abs() < 4 * est.std_error + 1e-6).all())  # fails once in 2000
        assert bool((est.std_error < 0.02).all())


def test_all_labels_known_is_the_conditional_vae():
    vae, x, label = semi_supervised(), data(), torch.tensor([0, 1, 2, 2, 1, 0])
    conditional = conditional_of(vae)
    ours = terms(vae.model, vae.guide, (x, label), 4)
    of_label = ours.guide["z"].value[label, :, torch.arange(6)].movedim(1, 0)  # what was drawn for the label itself
    theirs = terms(conditional.model, conditional.guide, (x, label), 4, values={"z": of_label})
    expected = theirs.log_weight + vae.clusters.logits[0].log_softmax(-1)[label]
    torch.testing.assert_close(ours.log_weight, expected)
    torch.testing.assert_close(ours.elbo, expected)


def test_no_label_known_is_the_model_of_x_alone():
    vae, x = semi_supervised(), data()
    z = terms(vae.model, vae.guide, x, 4).guide["z"].value
    alone = terms(vae.model, vae.guide, x, 4, values={"z": z})
    unknown = terms(vae.model, vae.guide, (x, torch.full((6,), -1)), 4, values={"z": z})
    torch.testing.assert_close(alone.log_weight, unknown.log_weight)
    torch.testing.assert_close(alone.elbo, unknown.elbo)


def test_the_elbo_is_that_of_the_paper():
    """Labelled: L(x, y); unlabelled: sum_y q(y | x) L(x, y) + H(q(y | x)) (Kingma et al. 2014, equations 6 and 7)."""
    vae, x = semi_supervised(), data(4)
    label = torch.tensor([2, -1, 0, -1])
    t = terms(vae.model, vae.guide, (x, label), 2)
    z, log_pi = t.guide["z"].value, vae.clusters.logits[0].log_softmax(-1)
    bounds = []
    for y in range(CLASSES):
        given = torch.nn.functional.one_hot(torch.tensor(y), CLASSES).double().expand(4, CLASSES)
        loc, log_scale = vae.posterior.module.net(torch.cat([x, given], -1)).chunk(2, -1)
        logits = vae.likelihood.module.net(torch.cat([z[y], given.expand(2, 4, CLASSES)], -1))
        log_lik = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(-1)
        log_q = torch.distributions.Normal(loc, log_scale.exp()).log_prob(z[y]).sum(-1)
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z[y]).sum(-1)
        bounds.append(log_lik + log_pi[y] + log_p - log_q)
    bound, log_qy = torch.stack(bounds, -1), vae.classifier.net(x).log_softmax(-1)
    unlabelled = (log_qy.exp() * (bound - log_qy)).sum(-1)
    known = bound[:, torch.arange(4), label.clamp(min=0)]
    torch.testing.assert_close(t.elbo, torch.where(label < 0, unlabelled, known))


class AfterX(torch.nn.Module):
    """A network of [x, y] that is given y as its context."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, context):
        lead = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
        return self.net(torch.cat([x.expand(*lead, -1), context.expand(*lead, -1)], -1))


def test_a_part_that_declares_a_context_is_given_the_label_as_it_is():
    vae, x = semi_supervised(), data()
    other = SemiSupervisedVAE(
        vae.clusters, vae.prior, vae.likelihood.module, posteriors.DiagonalNormal(AfterX(vae.posterior.module.net)),
        vae.classifier,
    )  # fmt: skip
    t = terms(vae.model, vae.guide, x, 4)
    again = terms(other.model, other.guide, x, 4, values={"z": t.guide["z"].value})
    assert isinstance(other.posterior, posteriors.DiagonalNormal)
    torch.testing.assert_close(again.log_weight, t.log_weight)


def test_one_cluster_is_the_vae():
    vae = VAE(priors.StandardNormal(LATENT), likelihood(LATENT), posterior(FEATURES))
    one = DeepMixture(
        priors.OneHot(1), vae.prior, vae.likelihood, vae.posterior, posteriors.OneHot(nn.mlp(FEATURES, 1), 1)
    )
    x = data()
    t = terms(vae.model, vae.guide, x, 4)
    other = terms(one.model, one.guide, x, 4, values={"z": t.guide["z"].value})
    torch.testing.assert_close(other.log_weight, t.log_weight)
    torch.testing.assert_close(other.elbo, t.elbo)


ADAM = functools.partial(torch.optim.Adam, lr=2e-2)


def most_likely(pair: DeepMixture, x: Tensor) -> Tensor:
    return pair.classifier.net(x).argmax(-1)


def test_a_deep_mixture_finds_clusters():
    """Two clusters of bits, far apart: trained without labels, q(y | x) tells them apart."""
    truth, size = torch.arange(200) % 2, 12
    x = torch.rand(200, size).lt(torch.where(truth[:, None] == 0, 0.1, 0.9)).double()
    pair = DeepMixture(
        priors.OneHot(2),
        priors.ConditionalNormal(torch.nn.Linear(2, 2 * LATENT)),
        likelihoods.Bernoulli(nn.mlp(LATENT, size, hidden=(7,))),
        nn.ConcatContext(posteriors.DiagonalNormal(nn.mlp(size + 2, 2 * LATENT, hidden=(7,)))),
        posteriors.OneHot(nn.mlp(size, 2, hidden=(7,)), 2),
    )
    fit(pair.model, pair.guide, x, objective=objectives.ELBO(), optimizer=ADAM, epochs=50, progress=False)
    right = float((most_likely(pair, x) == truth).double().mean())
    assert max(right, 1 - right) > 0.9  # the names of the clusters are as they come


def test_few_labels_are_enough_where_classes_stand_apart():
    truth = torch.arange(300) % CLASSES
    centre = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1.0, 0, 1, 1], [0, 0, 1.0, 0, 1]]).mul(0.9).add(0.05)
    x = torch.rand(300, FEATURES).lt(centre[truth]).double()
    label = torch.where(torch.arange(300) < 9, truth, -1)
    vae = semi_supervised()
    objective = AuxiliaryLoss(objectives.ELBO(), vae.log_label, weight=10.0)
    fit(vae.model, vae.guide, (x, label), objective=objective, optimizer=ADAM, epochs=35, progress=False)
    assert float((most_likely(vae, x) == truth).double().mean()) > 0.9


def test_the_log_probability_of_labels_is_the_classifiers():
    vae, x = semi_supervised(), data(4)
    found = vae.log_label(x, torch.tensor([2, -1, 0, -1]))
    log_q = vae.classifier.net(x).log_softmax(-1)
    torch.testing.assert_close(found, torch.stack([log_q[0, 2], torch.tensor(0.0), log_q[2, 0], torch.tensor(0.0)]))


def test_images_take_labels_beside_their_channels():
    vae = ConditionalVAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli(nn.conv_decoder(2 + 3, (1, 8, 8), channels=(2, 2), hidden=4)),
        posteriors.DiagonalNormal(nn.conv_encoder((1 + 3, 8, 8), 4, channels=(2, 2), hidden=4)),
        nn.Labels(3),
        event_dim=3,
    )
    x, label = torch.rand(4, 1, 8, 8).lt(0.5).double(), torch.tensor([0, 1, 2, 0])
    est = log_marginal(vae.model, vae.guide, (x, label), num_particles=5, progress=False, proposal="guide")
    other = log_marginal(vae.model, vae.guide, (x, (label + 1) % 3), num_particles=5, progress=False, proposal="guide")
    assert bool((est.log_px != other.log_px).all())


# -- what is refused --------------------------------------------------------------------------------------------------

SURE = {  # what the label is called, and a pair with labels for 0, 1, 2
    "conditional": (lambda: conditional_of(semi_supervised()), [0, 1, 2, 0], r"labels: expected classes 0 to 2"),
    "semi-supervised": (semi_supervised, [0, -1, 2, -1], r"label: expected -1 \(unknown\) or classes 0 to 2"),
}
USES = {
    "check": lambda p, d: check(p.model, p.guide, d),
    "fit": lambda p, d: fit(p.model, p.guide, d, objective=objectives.ELBO(), epochs=1, batch_size=2, progress=False),
    "log_marginal": lambda p, d: log_marginal(p.model, p.guide, d, num_particles=2, progress=False, proposal="guide"),
}


@pytest.mark.parametrize("wrong", [3, -2])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", SURE)
def test_a_label_outside_the_classes_is_refused_by_name(name, use, wrong):
    make, label, message = SURE[name]
    label = torch.tensor([*label[:3], wrong])
    with pytest.raises(DataError, match=f"{message}, found {wrong} at row ."):
        USES[use](make(), (data(4), label))


def test_labels_that_are_no_whole_numbers_are_refused():
    vae = conditional_of(semi_supervised())
    with pytest.raises(DataError, match=r"labels: expected classes 0 to 2 in whole numbers, found torch.float64"):
        check(vae.model, vae.guide, (data(4), torch.tensor([0.0, 1.0, 2.0, 0.5])))


def test_data_without_a_second_tensor_are_refused():
    vae = conditional_of(semi_supervised())
    with pytest.raises(UsageError, match="expected a context, the batch's second tensor"):
        check(vae.model, vae.guide, data(4))


def test_a_label_outside_the_classes_is_named_in_a_captured_step_too(monkeypatch):
    from ppvae.inference import compiled_step

    monkeypatch.setattr(compiled_step, "WAIT", 1)
    monkeypatch.setattr(sys.modules["ppvae.training.trainer"], "WORTH_CAPTURING", 0.0)
    vae, x = conditional_of(semi_supervised()), data(40)
    label = torch.arange(40) % 3
    label[-1] = 3
    seeds = [s for s in range(20) if 39 in torch.randperm(40, generator=torch.Generator().manual_seed(s))[-4:]]
    with pytest.raises(PpvaeError, match="labels: expected classes 0 to 2, found 3 at row"):
        fit(vae.model, vae.guide, (x, label), epochs=3, batch_size=4, compile=None, seed=seeds[0], progress=False)
    assert math.isfinite(sum(float(p.detach().sum()) for p in vae.parameters()))


def test_labels_of_another_kind_are_named_and_the_cures_work():
    vae, x = semi_supervised(), data()
    rows = torch.arange(len(x)) % 2
    with pytest.raises(DataError, match=r"found shape \[6, 2\]; of one-hot rows pass y.argmax"):
        check(vae.model, vae.guide, (x, torch.nn.functional.one_hot(rows, 2)))
    gaps = rows.float().masked_fill(rows == 1, torch.nan)
    with pytest.raises(DataError, match=r"whole numbers.* pass it with \.nan_to_num\(nan=-1\)\.long\(\)"):
        check(vae.model, vae.guide, (x, with_missing(gaps)))
    check(vae.model, vae.guide, (x, gaps.nan_to_num(nan=-1).long()))
    for y in (pd.Series(gaps.numpy(), index=range(10, 16)), gaps.numpy(), with_missing(gaps)):
        check(vae.model, vae.guide, (x, torch.tensor(np.asarray(y)).nan_to_num(nan=-1).long()))
    assert torch.equal(vae.classify(x.numpy()), vae.classify(x))


TEXT = ["a", "b", "a", None, "b", "a"]


@pytest.mark.parametrize("labels", [TEXT, TEXT[:3] + TEXT[:3]], ids=["with gaps", "complete"])
@pytest.mark.parametrize("kind", ["list", "series", "array", "categorical", "index 10"])
def test_the_cures_of_labels_in_words_end_in_a_run(kind, labels):
    y = {
        "list": labels, "series": pd.Series(labels), "array": np.array(labels),
        "categorical": pd.Series(labels).astype("category"), "index 10": pd.Series(labels, index=range(10, 16)),
    }[kind]  # fmt: skip
    vae, x = semi_supervised(), data()
    with pytest.raises(DataError, match=r"pandas\.factorize\((pandas\.Series\(x\)|x)\)\[0\]") as error:
        fit(vae.model, vae.guide, (x, y), objective=objectives.ELBO(), epochs=1)
    y = pd.factorize(pd.Series(y) if "factorize(pandas.Series(x))" in str(error.value) else y)[0]
    assert fit(vae.model, vae.guide, (x, y), objective=objectives.ELBO(), epochs=1).history


def test_labels_of_which_none_is_known_are_said_once(caplog):
    vae, x = semi_supervised(), data()
    for label, said in ((torch.full((6,), -1), True), (torch.tensor([-1, -1, 1, -1, -1, -1]), False)):
        caplog.clear()
        fit(vae.model, vae.guide, (x, label), objective=objectives.ELBO(), epochs=1)
        found = [r.getMessage() for r in caplog.records if "none is known" in r.getMessage()]
        assert len(found) == said


def test_a_table_is_classified_without_a_warning():
    vae, x = semi_supervised(), data()
    frame = pd.DataFrame(x.numpy())
    frame.values.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for table in (frame, frame.to_numpy(copy=True), frame.iloc[::1], x):
            found = vae.classify(table)
            assert type(found) is Tensor
            assert torch.equal(found, vae.classify(x))
        fixed = frame.to_numpy(copy=True)
        fixed.flags.writeable = False
        assert torch.equal(vae.classify(fixed), vae.classify(x))


def test_the_cure_of_another_precision_works():
    vae, x = semi_supervised(), data()
    frame = pd.DataFrame(x.numpy())
    with pytest.raises(DataError, match=r"classify: .*float64 .*found float32.*\.astype\('float64'\)"):
        vae.classify(frame.astype("float32"))
    assert torch.equal(vae.classify(frame.astype("float32").astype("float64")), vae.classify(x.float().double()))


@pytest.mark.parametrize("label", [None, [-1] * 6, [0, -1, 1, -1, 0, -1], [0, 1, 0, 1, 0, 1]])
def test_labels_are_no_dims_of_x(label):
    """Whether they are known or not: complete data have no missing or masked value."""
    vae, batch = semi_supervised(), (data(), *([torch.tensor(label)] if label else []))
    est = log_marginal(vae.model, vae.guide, batch, num_particles=20, progress=False)
    assert est.dims == FEATURES
    assert not any("masked" in note or "missing" in note for note in est.notes)
    assert est.bits_per_dim == pytest.approx(est.nll / (FEATURES * math.log(2)))
