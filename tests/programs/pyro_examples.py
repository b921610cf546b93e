"""Short versions of the examples that ship with Pyro, written anew in the form in which they are taught there.

They know nothing of ppvae. Each is an `Example`; `examples()` gives all of them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus


@dataclass
class Example:
    """A pair, its data, the objective of Pyro's example, and the error of `log_marginal` (a pattern), if any.

    `inspected` is false where the pair is refused by `check` and `fit`, too.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    data: tuple[Tensor, ...]
    objective: Any
    refusal: str = ""
    inspected: bool = True
    batch_size: int = 20


def bits(*shape: int) -> Tensor:
    return torch.bernoulli(torch.full(shape, 0.4), generator=torch.Generator().manual_seed(0))


def counts(*shape: int, rate: float = 3.0) -> Tensor:
    return torch.poisson(torch.full(shape, rate), generator=torch.Generator().manual_seed(0))


def broadcast_cat(*tensors: Tensor) -> Tensor:
    """Concatenates the last dims under broadcasting, as Pyro's helpers of these examples do."""
    shape = torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))
    return torch.cat([t.expand(*shape, t.shape[-1]) for t in tensors], -1)


class VAE(nn.Module):
    """vae.py"""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], 2)
            z = pyro.sample("latent", dist.Normal(z_loc, torch.ones_like(z_loc)).to_event(1))
            loc_img = torch.sigmoid(self.decoder(z))
            pyro.sample("obs", dist.Bernoulli(loc_img, validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(z_loc, z_scale.exp()).to_event(1))


class SSVAE(nn.Module):
    """ss_vae_M2.py: a plate without a size; the guide enumerates the label, unless it is given"""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_y, self.encoder_z, self.decoder = nn.Linear(6, 3), nn.Linear(9, 4), nn.Linear(5, 6)

    def model(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            zs = pyro.sample("z", dist.Normal(torch.zeros(len(xs), 2), torch.ones(len(xs), 2)).to_event(1))
            ys = pyro.sample("y", dist.OneHotCategorical(torch.ones(len(xs), 3) / 3), obs=ys)
            loc = torch.sigmoid(self.decoder(broadcast_cat(zs, ys)))
            pyro.sample("x", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=xs)

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data"):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(torch.softmax(self.encoder_y(xs), -1)))
            loc, scale = self.encoder_z(broadcast_cat(xs, ys)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


class DMM(nn.Module):
    """dmm.py: masks inside the event in the model, of rows in a guide with inverse autoregressive flows"""

    def __init__(self, num_iafs: int) -> None:
        super().__init__()
        self.emitter, self.trans, self.combiner = nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(5, 4)
        self.iafs = [affine_autoregressive(2, hidden_dims=[4]) for _ in range(num_iafs)]
        self.iafs_modules = nn.ModuleList(self.iafs)
        self.rnn = nn.RNN(3, 3, batch_first=True)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.h_0 = nn.Parameter(torch.zeros(1, 1, 3))

    def model(self, batch: Tensor, mask: Tensor, annealing_factor: float = 1.0) -> None:
        pyro.module("dmm", self)
        z = self.z_0.expand(batch.size(0), 2)
        with pyro.plate("z_minibatch", len(batch)):
            for t in pyro.markov(range(1, batch.size(1) + 1)):
                loc, scale = self.trans(z).chunk(2, -1)
                here = mask[:, t - 1 : t]
                with poutine.scale(scale=annealing_factor):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, softplus(scale)).mask(here).to_event(1))
                emission = dist.Bernoulli(torch.sigmoid(self.emitter(z)))
                pyro.sample(f"obs_x_{t}", emission.mask(here).to_event(1), obs=batch[:, t - 1, :])

    def guide(self, batch: Tensor, mask: Tensor, annealing_factor: float = 1.0) -> None:
        pyro.module("dmm", self)
        hidden, _ = self.rnn(batch, self.h_0.expand(1, batch.size(0), 3).contiguous())
        z = self.z_q_0.expand(batch.size(0), 2)
        with pyro.plate("z_minibatch", len(batch)):
            for t in pyro.markov(range(1, batch.size(1) + 1)):
                here = hidden[:, t - 1].expand(*z.shape[:-1], 3)
                loc, scale = self.combiner(torch.cat([z, here], -1)).chunk(2, -1)
                fn: Any = dist.Normal(loc, softplus(scale))
                if self.iafs:
                    fn = dist.TransformedDistribution(fn, self.iafs).mask(mask[:, t - 1])
                else:
                    fn = fn.mask(mask[:, t - 1 : t]).to_event(1)
                with poutine.scale(scale=annealing_factor):
                    z = pyro.sample(f"z_{t}", fn)


class CVAE(nn.Module):
    """cvae.py: the masked pixels of y given the visible ones, x = -1 marks those to predict; a learned prior"""

    def __init__(self) -> None:
        super().__init__()
        self.baseline_net, self.prior_net = nn.Linear(6, 6), nn.Linear(12, 4)
        self.generation_net, self.recognition_net = nn.Linear(2, 6), nn.Linear(12, 4)

    def model(self, xs: Tensor, ys: Tensor) -> None:
        pyro.module("generation_net", self)
        batch_size = xs.shape[0]
        with pyro.plate("data"):
            with torch.no_grad():
                y_hat = self.baseline_net(xs).view(xs.shape)
            prior_loc, prior_scale = self.prior_net(torch.cat([xs, y_hat], -1)).chunk(2, -1)
            zs = pyro.sample("z", dist.Normal(prior_loc, prior_scale.exp()).to_event(1))
            loc = torch.sigmoid(self.generation_net(zs))
            mask_loc = loc[(xs == -1).view(-1, 6)].view(batch_size, -1)
            mask_ys = ys[xs == -1].view(batch_size, -1)
            pyro.sample("y", dist.Bernoulli(mask_loc, validate_args=False).to_event(1), obs=mask_ys)

    def guide(self, xs: Tensor, ys: Tensor) -> None:
        with pyro.plate("data"):
            loc, scale = self.recognition_net(torch.cat([xs, ys], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


class SparseGammaDEF:
    """sparse_gamma_def.py: weights shared by all data in plates of their own, parameters of one row a datum"""

    top, mid, size = 3, 2, 4

    def model(self, x: Tensor) -> None:
        with pyro.plate("w_top_plate", self.top * self.mid):
            w_top = pyro.sample("w_top", dist.Gamma(0.5, 0.5))
        with pyro.plate("w_mid_plate", self.mid * self.size):
            w_mid = pyro.sample("w_mid", dist.Gamma(0.5, 0.5))
        with pyro.plate("data", x.size(0)):
            z_top = pyro.sample("z_top", dist.Gamma(0.5, 0.5).expand([self.top]).to_event(1))
            shape = (self.top, self.mid)
            w_top = w_top.reshape(shape) if w_top.dim() == 1 else w_top.reshape(-1, *shape)
            z_mid = pyro.sample("z_mid", dist.Gamma(0.5, 0.5 / torch.matmul(z_top, w_top)).to_event(1))
            shape = (self.mid, self.size)
            w_mid = w_mid.reshape(shape) if w_mid.dim() == 1 else w_mid.reshape(-1, *shape)
            pyro.sample("obs", dist.Poisson(torch.matmul(z_mid, w_mid)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        def gamma(name: str, *shape: int) -> Any:
            alpha = softplus(pyro.param(f"alpha_{name}", lambda: 1 + 0.1 * torch.rand(*shape)))
            mean = softplus(pyro.param(f"mean_{name}", lambda: 1 + 0.1 * torch.rand(*shape)))
            return dist.Gamma(alpha, alpha / mean)

        with pyro.plate("w_top_plate", self.top * self.mid):
            pyro.sample("w_top", gamma("w_top", self.top * self.mid))
        with pyro.plate("w_mid_plate", self.mid * self.size):
            pyro.sample("w_mid", gamma("w_mid", self.mid * self.size))
        with pyro.plate("data", x.size(0)):
            pyro.sample("z_top", gamma("z_top", x.size(0), self.top).to_event(1))
            pyro.sample("z_mid", gamma("z_mid", x.size(0), self.mid).to_event(1))


class SCANVI(nn.Module):
    """scanvi.py: one scale around both sides, and a classification loss as a factor of the guide"""

    def __init__(self) -> None:
        super().__init__()
        self.z2_decoder, self.x_decoder, self.encoder = nn.Linear(5, 4), nn.Linear(2, 8), nn.Linear(4, 6)
        self.classifier, self.z1_encoder, self.scale_factor = nn.Linear(2, 3), nn.Linear(5, 4), 1 / 80

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        theta = pyro.param("inverse_dispersion", 10.0 * x.new_ones(4), constraint=constraints.positive)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale_factor):
            z1 = pyro.sample("z1", dist.Normal(0, x.new_ones(2)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(3)), obs=y)
            z2_loc, z2_scale = self.z2_decoder(broadcast_cat(z1, y)).chunk(2, -1)
            z2 = pyro.sample("z2", dist.Normal(z2_loc, softplus(z2_scale)).to_event(1))
            size = pyro.sample("l", dist.LogNormal(2.0, x.new_ones(1)).to_event(1))
            gate_logits, mu = self.x_decoder(z2).chunk(2, -1)
            logits = (size * mu.softmax(-1) + 0.005).log() - (theta + 0.005).log()
            fn = dist.ZeroInflatedNegativeBinomial(gate_logits=gate_logits, total_count=theta, logits=logits)
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale_factor):
            z2_loc, z2_scale, l_loc, l_scale = self.encoder(x.log1p()).split([2, 2, 1, 1], -1)
            pyro.sample("l", dist.LogNormal(2 + l_loc, softplus(l_scale)).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z2_loc, softplus(z2_scale)).to_event(1))
            y_dist = dist.OneHotCategorical(logits=self.classifier(z2))
            if y is None:
                y = pyro.sample("y", y_dist)
            else:
                pyro.factor("classification_loss", -0.1 * y_dist.log_prob(y), has_rsample=False)
            z1_loc, z1_scale = self.z1_encoder(broadcast_cat(z2, y)).chunk(2, -1)
            pyro.sample("z1", dist.Normal(z1_loc, softplus(z1_scale)).to_event(1))


def lda_pair(num_docs: int, transposed: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """lda.py: words are the first dim of its data; the guide draws the subsample, and has a point mass"""
    topics, words, length = 2, 5, 6
    predictor = nn.Sequential(nn.Linear(words, topics), nn.Softmax(-1))

    def model(data: Tensor) -> None:
        data = data.T if transposed else data
        with pyro.plate("topics", topics):
            topic_weights = pyro.sample("topic_weights", dist.Gamma(1.0 / topics, 1.0))
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(words) / words))
        with pyro.plate("documents", num_docs) as ind:
            data = data[:, ind]
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
            with pyro.plate("words", length):
                word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"})
                pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=data)

    def guide(data: Tensor) -> None:
        data = data.T if transposed else data
        weights = pyro.param("weights", lambda: torch.ones(topics), constraint=constraints.positive)
        kinds = pyro.param("kinds", lambda: torch.ones(topics, words), constraint=constraints.greater_than(0.5))
        with pyro.plate("topics", topics):
            pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
            pyro.sample("topic_words", dist.Dirichlet(kinds))
        pyro.module("predictor", predictor)
        with pyro.plate("documents", num_docs, 10) as ind:
            data = data[:, ind]
            histogram = torch.zeros(words, ind.size(0)).scatter_add(0, data, torch.ones(data.shape))
            pyro.sample("doc_topics", dist.Delta(predictor(histogram.transpose(0, 1)), event_dim=1))

    return model, guide


class ProdLDA(nn.Module):
    """The tutorial "Probabilistic topic modeling": a multinomial decoder with batch norm"""

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.bn = nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8, affine=False)
        self.encoder = nn.Sequential(nn.Linear(8, 6), nn.Softplus())
        self.bn_loc = nn.BatchNorm1d(3, affine=False)

    def model(self, docs: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("documents", docs.shape[0]):
            logtheta = pyro.sample("logtheta", dist.Normal(docs.new_zeros(docs.shape[0], 3), 1.0).to_event(1))
            probs = self.bn(self.beta(logtheta.softmax(-1))).softmax(1)
            total_count = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total_count, probs), obs=docs)

    def guide(self, docs: Tensor) -> None:
        pyro.module("encoder", self)
        with pyro.plate("documents", docs.shape[0]):
            loc, logvar = self.encoder(docs).chunk(2, -1)
            pyro.sample("logtheta", dist.Normal(self.bn_loc(loc), (0.5 * logvar).exp()).to_event(1))


class AIR(nn.Module):
    """air.py: a mask that depends on a latent, and a subsample that the guide alone draws"""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.predict, self.decode = nn.LSTMCell(16 + 3, 5), nn.Linear(5, 5), nn.Linear(2, 16)
        self.h_init = nn.Parameter(torch.zeros(1, 5))

    def model(self, data: Tensor) -> None:
        pyro.module("decode", self.decode)
        with pyro.plate("data", data.size(0)) as ix:
            batch = data[ix]
            n = batch.size(0)
            x, z_pres = torch.zeros(n, 16), torch.ones(n, 1)
            for t in range(2):
                z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(0.5 * z_pres).to_event(1))
                prior = dist.Normal(torch.zeros(n, 2), torch.ones(n, 2))
                z_what = pyro.sample(f"z_what_{t}", prior.mask(z_pres).to_event(1))
                x = x + self.decode(z_what) * z_pres.view(-1, 1)
            pyro.sample("obs", dist.Normal(x.view(n, -1), 0.5 * torch.ones(n, 16)).to_event(1), obs=batch.view(n, -1))

    def guide(self, data: Tensor) -> None:
        pyro.module("rnn", self.rnn)
        pyro.module("predict", self.predict)
        pyro.param("h_init", self.h_init)
        with pyro.plate("data", data.size(0), subsample_size=10) as ix:
            batch = data[ix]
            n = batch.size(0)
            h, c = self.h_init.expand(n, -1), torch.zeros(n, 5)
            z_pres, z_what = torch.ones(n, 1), torch.zeros(n, 2)
            for t in range(2):
                h, c = self.rnn(torch.cat((batch.view(n, -1), z_what, z_pres), 1), (h, c))
                out = self.predict(h)
                p = 0.05 + 0.9 * torch.sigmoid(out[:, :1])
                z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(p * z_pres).to_event(1))
                fn = dist.Normal(out[:, 1:3], softplus(out[:, 3:]) + 0.3)
                z_what = pyro.sample(f"z_what_{t}", fn.mask(z_pres).to_event(1))


def not_pooled(at_bats: Tensor, hits: Tensor) -> None:
    """baseball.py"""
    with pyro.plate("num_players", at_bats.shape[0]):
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


def fully_pooled(at_bats: Tensor, hits: Tensor) -> None:
    """baseball.py"""
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    with pyro.plate("num_players", at_bats.shape[0]):
        pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


def partially_pooled_with_logit(at_bats: Tensor, hits: Tensor) -> None:
    """baseball.py"""
    loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("num_players", at_bats.shape[0]):
        alpha = pyro.sample("alpha", dist.Normal(loc, scale))
        pyro.sample("obs", dist.Binomial(at_bats, logits=alpha), obs=hits)


def examples() -> dict[str, Example]:
    """Every example by name, with fresh networks."""
    torch.manual_seed(0)
    vae, ss_vae, cvae, scanvi, lda, air = VAE(), SSVAE(), CVAE(), SCANVI(), ProdLDA(), AIR()
    dmm, dmm_iaf, gamma = DMM(0), DMM(2), SparseGammaDEF()
    labels = torch.eye(3)[torch.arange(60) % 3]
    lengths = torch.arange(60) % 4 + 1
    mask = torch.arange(4) < lengths[:, None]
    sequences = (bits(60, 4, 3) * mask[..., None], mask)
    visible = torch.where(torch.arange(6) < 3, bits(60, 6), -torch.ones(60, 6))
    words = torch.randint(5, (6, 30), generator=torch.Generator().manual_seed(0))
    players = (torch.full((18,), 45.0), counts(18, rate=12.0))
    enumerate_guide = {"default": "parallel", "expand": True}
    elbo, enum = Trace_ELBO(), TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    lda_pairs = lda_pair(30, False), lda_pair(30, True)
    return {
        "vae": Example(vae.model, vae.guide, (bits(60, 6),), elbo),
        "vae, analytic KL": Example(vae.model, vae.guide, (bits(60, 6),), TraceMeanField_ELBO()),
        "ss_vae, unlabelled": Example(
            ss_vae.model, config_enumerate(ss_vae.guide, **enumerate_guide), (bits(60, 6),), enum
        ),
        "ss_vae, labelled": Example(ss_vae.model, ss_vae.guide, (bits(60, 6), labels), enum),
        "dmm": Example(dmm.model, dmm.guide, sequences, elbo),
        "dmm, with IAF": Example(dmm_iaf.model, dmm_iaf.guide, sequences, elbo),
        "dmm, annealed": Example(
            lambda x, mask: dmm.model(x, mask, 0.5), lambda x, mask: dmm.guide(x, mask, 0.5), sequences, elbo,
            refusal="'z_1'.*scale 1; found scale 0.5",
        ),
        "cvae": Example(cvae.model, cvae.guide, (visible, bits(60, 6)), elbo),
        "sparse_gamma_def": Example(gamma.model, gamma.guide, (counts(25, 4),), TraceMeanField_ELBO(), batch_size=25),
        "scanvi, unlabelled": Example(
            scanvi.model, config_enumerate(scanvi.guide, **enumerate_guide), (counts(60, 4),), enum
        ),
        "scanvi, labelled": Example(scanvi.model, scanvi.guide, (counts(60, 4), labels), enum),
        "lda": Example(
            *lda_pairs[0], (words,), TraceEnum_ELBO(max_plate_nesting=2),
            refusal="'documents'.*6 data of the batch, found size 30.*movedim", inspected=False,
        ),
        "lda, documents first": Example(
            *lda_pairs[1], (words.T,), TraceEnum_ELBO(max_plate_nesting=2), refusal="'doc_topics'.*Delta"
        ),
        "prodlda": Example(lda.model, lda.guide, (counts(60, 8),), TraceMeanField_ELBO()),
        "air": Example(air.model, air.guide, (torch.rand(20, 4, 4),), TraceGraph_ELBO()),
        "baseball, not pooled": Example(not_pooled, AutoNormal(not_pooled), players, elbo),
        "baseball, fully pooled": Example(fully_pooled, AutoNormal(fully_pooled), players, elbo),
        "baseball, partially pooled": Example(
            partially_pooled_with_logit, AutoNormal(partially_pooled_with_logit), players, elbo
        ),
    }  # fmt: skip
