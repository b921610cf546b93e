"""Model/guide pairs in plain Pyro, as users write them without ppvae: PAIRS maps a name to () -> (model, guide, batch).

Every batch is a tuple of tensors with the data in the first dim. Networks are random and small, in torch's default
dtype; a pair registers its parameters under names of its own, so that all pairs can live in one param store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

Pair = tuple[Callable[..., Any], Callable[..., Any], tuple[torch.Tensor, ...]]
PAIRS: dict[str, Callable[[], Pair]] = {}
SIZE = 6  # data in every batch, except of "indexes" and "local_params", which are called with a whole data set
DATASET_SIZE = 10  # data in those two, of which the plate takes four


def register_pair(build: Callable[[], Pair]) -> Callable[[], Pair]:
    def seeded() -> Pair:
        torch.manual_seed(20)
        return build()

    PAIRS[build.__name__] = seeded
    return seeded


class Encoder(nn.Module):
    """x [..., features] -> location and scale [..., latent]."""

    def __init__(self, features: int, latent: int, hidden: int = 7):
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.loc, self.log_scale = nn.Linear(hidden, latent), nn.Linear(hidden, latent)

    def forward(self, x):
        h = torch.tanh(self.hidden(x))
        return self.loc(h), self.log_scale(h).exp()


def tanh_decoder(latent: int, features: int, hidden: int = 7) -> nn.Module:
    return nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, features))


def random_bits(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape) < 0.4).to(torch.get_default_dtype())


@register_pair
def modules() -> Pair:
    """The tutorial's VAE: an encoder and a decoder registered by pyro.module, Bernoulli pixels."""
    encoder, net = Encoder(8, 2), tanh_decoder(2, 8)

    def model(x):
        pyro.module("modules.decoder", net)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("modules.encoder", encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = encoder(x)
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))

    return model, guide, (random_bits(SIZE, 8),)


def hierarchy(full: int) -> Pair:
    """z2 -> z1 -> x in a plate of full size `full`, called with a batch; guide q(z1 | x) q(z2 | z1)."""
    torch.manual_seed(21)
    up, top = Encoder(5, 3), Encoder(3, 2)
    down, out = Encoder(2, 3), tanh_decoder(3, 5)

    def model(x):
        pyro.module("hierarchy.down", down)
        pyro.module("hierarchy.out", out)
        with pyro.plate("data", full, subsample=x):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(*down(z2)).to_event(1))
            pyro.sample("x", dist.Normal(out(z1), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("hierarchy.up", up)
        pyro.module("hierarchy.top", top)
        with pyro.plate("data", full, subsample=x):
            z1 = pyro.sample("z1", dist.Normal(*up(x)).to_event(1))
            pyro.sample("z2", dist.Normal(*top(z1)).to_event(1))

    return model, guide, (torch.randn(SIZE, 5),)


@register_pair
def hierarchical() -> Pair:
    """Two latents, and a plate that knows the size of the whole data set."""
    return hierarchy(100)


@register_pair
def indexes() -> Pair:
    """The plate draws a subsample, and the pair indexes the data itself."""
    encoder, net = Encoder(5, 2), tanh_decoder(2, 5)

    def model(x):
        pyro.module("indexes.decoder", net)
        with pyro.plate("rows", len(x), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x[index])

    def guide(x):
        pyro.module("indexes.encoder", encoder)
        with pyro.plate("rows", len(x), subsample_size=4) as index:
            pyro.sample("z", dist.Normal(*encoder(x[index])).to_event(1))

    return model, guide, (torch.randn(DATASET_SIZE, 5),)


@register_pair
def local_params() -> Pair:
    """No encoder: a parameter per datum, which the subsampled plate indexes; the model's parameters are constrained."""
    start = torch.randn(DATASET_SIZE, 2)

    def model(x):
        weight = pyro.param("local.weight", torch.ones(2, 3))
        scale = pyro.param("local.noise", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x.index_select(0, index))

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=4):
            loc = pyro.param("local.loc", start.clone(), event_dim=1)
            scale = pyro.param(
                "local.scale", 0.5 * torch.ones(DATASET_SIZE, 2), constraint=constraints.positive, event_dim=1
            )
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide, (torch.randn(DATASET_SIZE, 3),)


class ConvDecoder(nn.Module):
    """z [batch, 3] -> logits [batch, 1, 4, 4]; takes exactly one batch dim."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose2d(2, 1, 2, stride=2)

    def forward(self, z):
        h = torch.relu(self.norm(self.dense(z)))
        return self.up(h.view(z.shape[0], 2, 2, 2))


class ConvEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 4, 2, stride=2), nn.BatchNorm2d(4), nn.Linear(16, 6)

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x)))
        return self.out(h.view(x.size(0), -1)).chunk(2, dim=-1)


@register_pair
def conv() -> Pair:
    """Convolutions, .view(x.shape[0], ...) and batch norm with statistics that are not the initial ones."""
    encoder, net = ConvEncoder(), ConvDecoder()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2.0)

    def model(x):
        pyro.module("conv.decoder", net)
        with pyro.plate("data", x.size(0)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.size(0), 3), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(3), obs=x)

    def guide(x):
        pyro.module("conv.encoder", encoder)
        with pyro.plate("data", x.size(0)):
            loc, log_scale = encoder(x)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (random_bits(SIZE, 1, 4, 4),)


@register_pair
def params() -> Pair:
    """pyro.param alone, with constraints; latent and datum are single numbers."""

    def model(x):
        loc = pyro.param("params.loc", torch.tensor(0.3))
        scale = pyro.param("params.scale", torch.tensor(1.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    def guide(x):
        slope = pyro.param("params.slope", torch.tensor(0.6), constraint=constraints.unit_interval)
        scale = pyro.param("params.guide_scale", torch.tensor(0.8), constraint=constraints.interval(0.01, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, scale))

    return model, guide, (torch.randn(SIZE),)


class Model(PyroModule):
    def __init__(self):
        super().__init__("classes.model")
        self.net = PyroModule[nn.Linear](2, 5)
        self.scale = PyroParam(torch.tensor([0.4, 0.5, 0.6, 0.7, 0.8]), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(5.0, torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Laplace(self.net(z), self.scale).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__("classes.guide")
        self.encoder = PyroModule[Encoder](5, 2)
        self.factor = PyroParam(lambda: torch.tensor(1.5), constraint=constraints.greater_than(1.0))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x)
            pyro.sample("z", dist.StudentT(4.0, loc, self.factor * scale).to_event(1))


@register_pair
def classes() -> Pair:
    """PyroModule classes with PyroParam: their parameters come into the store as they are used."""
    return Model(), Guide(), (torch.randn(SIZE, 5),)


@register_pair
def auto_normal() -> Pair:
    """An automatic guide: a helper and a Delta for each latent, a parameter per datum, and a positive latent."""
    net = tanh_decoder(2, 4)

    def model(x):
        pyro.module("auto.decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), torch.tensor(3.0)))
            pyro.sample("x", dist.Normal(net(z), rate[..., None]).to_event(1), obs=x)

    return model, AutoNormal(model, init_scale=0.4), (torch.randn(SIZE, 4),)


@register_pair
def shared_latent() -> Pair:
    """A latent shared by all data: weights are joint."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        mean = pyro.param("shared.mean", torch.tensor([0.1, 0.2, 0.3]))
        loc = pyro.sample("loc", dist.Normal(mean, 0.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x + 0.2 * loc, 0.6).to_event(1))

    return model, guide, (torch.randn(SIZE, 3),)


@register_pair
def enumerated_model() -> Pair:
    """A Gaussian mixture whose component is summed out in the model and absent from the guide."""
    locs, net, encoder = torch.randn(3, 2), tanh_decoder(2, 4), Encoder(4, 2)

    def model(x):
        pyro.module("mixture.decoder", net)
        weights = pyro.param("mixture.weights", torch.tensor([0.2, 0.3, 0.5]), constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(locs[k], 0.7).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("mixture.encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    return model, guide, (torch.randn(SIZE, 4),)


@register_pair
def enumerated_vector() -> Pair:
    """Only discrete latents, three in an inner plate, all summed out: the guide is empty."""
    weight = torch.randn(3, 2, 4)

    def model(x):
        prior = pyro.param("vector.prior", torch.tensor(0.3), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)), pyro.plate("units", 3, dim=-2):
            on = pyro.sample("on", dist.Bernoulli(prior), infer={"enumerate": "parallel"})
            rows = weight[torch.arange(3)[:, None], on.long()]
            pyro.sample("part", dist.Normal(rows, 1.0).to_event(1), obs=x.transpose(0, 1))

    def guide(x):
        pass

    return model, guide, (torch.randn(SIZE, 3, 4),)


@register_pair
def markov() -> Pair:
    """A hidden Markov chain of four steps, whose states share two enumeration dims."""
    transition = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    locs = torch.tensor([-1.0, 1.5])

    def model(x):
        loc = pyro.param("markov.shift", torch.tensor(0.2))
        with pyro.plate("data", len(x)):
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
            state = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(4)):
                state = pyro.sample(f"s{t}", dist.Categorical(transition[state]), infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(locs[state] + offset + loc, 1.0), obs=x[:, t])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("offset", dist.Normal(x.mean(-1), 0.5))

    return model, guide, (torch.randn(SIZE, 4),)


@register_pair
def semi_supervised() -> Pair:
    """y is enumerated in the guide, and z is drawn given each y (Kingma et al. 2014)."""
    classifier, encoder, net = nn.Linear(4, 3), Encoder(4 + 3, 2), tanh_decoder(2 + 3, 4)

    def joined(a, y):
        shape = torch.broadcast_shapes(a.shape[:-1], y.shape[:-1])
        return torch.cat([a.expand(*shape, -1), y.expand(*shape, -1)], -1)

    def model(x):
        pyro.module("semi.decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.tensor([0.5, 0.3, 0.2])))
            pyro.sample("x", dist.Normal(net(joined(z, y)), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("semi.classifier", classifier)
        pyro.module("semi.encoder", encoder)
        with pyro.plate("data", len(x)):
            q = dist.OneHotCategorical(logits=classifier(x))
            y = pyro.sample("y", q, infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(*encoder(joined(x, y))).to_event(1))

    return model, guide, (torch.randn(SIZE, 4),)


@register_pair
def enumerated_both() -> Pair:
    """Two discrete sites enumerated in the guide, the second given the first, and a third in the model alone."""
    table = torch.randn(2, 3, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.3)))
            b = pyro.sample("b", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.6)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(a - b, 1.0))
            pyro.sample("x", dist.Normal(table[a.long(), b, c.long()] + z, 0.8), obs=x)

    def guide(x):
        bias = pyro.param("both.bias", torch.tensor([0.1, -0.2, 0.3]))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(logits=x), infer={"enumerate": "parallel"})
            logits = bias + a[..., None] * torch.tensor([1.0, 0.0, -1.0]) + x[..., None]
            b = pyro.sample("b", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(x - 0.5 * b + a, 0.9))

    return model, guide, (torch.randn(SIZE),)


@register_pair
def discrete() -> Pair:
    """A vector of binary latents, sampled by the guide."""
    encoder, net = nn.Linear(5, 4), tanh_decoder(4, 5)

    def model(x):
        pyro.module("discrete.decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3 * torch.ones(4)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("discrete.encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    return model, guide, (random_bits(SIZE, 5),)


@register_pair
def inner_plate() -> Pair:
    """Three observations per datum in an inner plate at dim -2, each with a latent of its own, and one above them."""
    weight = torch.randn(2, 4)

    def model(x):
        scale = pyro.param("inner.scale", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(u[..., None] * torch.ones(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x.transpose(0, 1))

    def guide(x):
        slope = pyro.param("inner.slope", torch.tensor(0.3))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("u", dist.Normal(slope * x.mean((-1, -2)), 0.8))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("z", dist.Normal(slope * x.transpose(0, 1)[..., :2], 0.9).to_event(1))

    return model, guide, (torch.randn(SIZE, 3, 4),)


@register_pair
def sequential_plate() -> Pair:
    """An inner plate that is a Python loop: sites z_0, z_1, z_2."""

    def model(x):
        with pyro.plate("data", len(x)):
            for i in pyro.plate("steps", 3):
                z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0 + i))
                pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=x[:, i])

    def guide(x):
        slope = pyro.param("steps.slope", torch.tensor([0.5, 0.6, 0.7]))
        with pyro.plate("data", len(x)):
            for i in pyro.plate("steps", 3):
                pyro.sample(f"z_{i}", dist.Normal(slope[i] * x[:, i], 0.7))

    return model, guide, (torch.randn(SIZE, 3),)


@register_pair
def obs_mask() -> Pair:
    """Half of the labels are missing: obs_mask makes a site x_unobserved that no guide samples."""
    seen = torch.arange(SIZE) % 2 == 0

    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x, obs_mask=seen)
            pyro.sample("w", dist.Normal(-z, 0.8), obs=2 * x)

    def guide(x, seen):
        slope = pyro.param("obs_mask.slope", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.8))

    return model, guide, (torch.randn(SIZE), seen)


@register_pair
def masked() -> Pair:
    """Ragged data: a latent and an observation count for some data only, by poutine.mask and by .mask()."""

    def model(x, there):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=there):
                extra = pyro.sample("extra", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(extra, 0.5), obs=x)
            pyro.sample("w", dist.Normal(z, 0.8).mask(~there), obs=2 * x)

    def guide(x, there):
        slope = pyro.param("masked.slope", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(slope * x, 0.8))
            pyro.sample("extra", dist.Normal(slope * z, 0.9).mask(there))

    return model, guide, (torch.randn(SIZE), torch.arange(SIZE) % 3 != 0)


@register_pair
def rnn() -> Pair:
    """A recurrent decoder, which takes [batch, time, features] and nothing else."""
    encoder, gru, out = Encoder(5, 3), nn.GRU(3, 6, batch_first=True), nn.Linear(6, 1)

    def model(x):
        pyro.module("rnn.gru", gru)
        pyro.module("rnn.out", out)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            hidden, _ = gru(z.unsqueeze(1).repeat(1, 5, 1))
            pyro.sample("x", dist.Normal(out(hidden).squeeze(-1), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("rnn.encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    return model, guide, (torch.randn(SIZE, 5),)


@register_pair
def auxiliary() -> Pair:
    """A helper in the guide, and a Delta that carries the log-determinant of what is done to it."""
    encoder, net = Encoder(4, 3), tanh_decoder(3, 4)

    def model(x):
        pyro.module("auxiliary.decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("auxiliary.encoder", encoder)
        with pyro.plate("data", len(x)):
            helper = pyro.sample("helper", dist.Normal(*encoder(x)).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(helper.exp(), log_density=-helper.sum(-1), event_dim=1))

    return model, guide, (torch.randn(SIZE, 4),)


@register_pair
def supports() -> Pair:
    """Latents that are positive or lie in the unit interval, with guides of other families on the same supports."""
    encoder = Encoder(3, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), torch.tensor(1.5)))
            share = pyro.sample("share", dist.Beta(torch.tensor(2.0), torch.tensor(3.0)))
            mix = pyro.sample("mix", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            loc = rate[..., None] * mix - share[..., None]
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("supports.encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x)
            pyro.sample("rate", dist.LogNormal(loc[..., 0], scale[..., 0]))
            pyro.sample("share", dist.Beta(1 + scale[..., 1], 2.0))
            pyro.sample("mix", dist.Dirichlet(1 + scale[..., 1:]))

    return model, guide, (torch.randn(SIZE, 3),)


@register_pair
def labelled() -> Pair:
    """A conditional VAE: the batch is (x, label)."""
    encoder, net = Encoder(4 + 3, 2), tanh_decoder(2 + 3, 4)

    def model(x, label):
        pyro.module("labelled.decoder", net)
        hot = nn.functional.one_hot(label, 3).to(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = net(torch.cat([z, hot.expand(*z.shape[:-1], 3)], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x, label):
        pyro.module("labelled.encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(torch.cat([x, nn.functional.one_hot(label, 3).to(x)], -1))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide, (random_bits(SIZE, 4), torch.arange(SIZE) % 3)


@register_pair
def flow() -> Pair:
    """A normal pushed through an inverse autoregressive flow."""
    encoder, net = Encoder(4, 3), tanh_decoder(3, 4)
    steps = [dist.transforms.affine_autoregressive(3, hidden_dims=[6]) for _ in range(2)]

    def model(x):
        pyro.module("flow.decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("flow.encoder", encoder)
        pyro.module("flow.steps", nn.ModuleList(steps))
        with pyro.plate("data", len(x)):
            base = dist.Normal(*encoder(x)).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, steps))

    return model, guide, (torch.randn(SIZE, 4),)
