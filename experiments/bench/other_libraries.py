"""The same steps and estimates in NumPyro and Pythae, if they are installed."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import time
from typing import Any

import torch
from torch import nn

from experiments.bench import Settings, Timed
from experiments.bench.hand_written import per_step
from experiments.bench.pairs import build, data


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def one_thread() -> None:
    """Asks XLA for one thread, as torch has; must be called before jax is imported."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def weights(net: nn.Module) -> list[tuple[Any, Any]]:
    """The (weight, bias) of each linear layer of a network, for jax."""
    import jax.numpy as jnp

    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    return [(jnp.asarray(m.weight.detach().numpy()).T, jnp.asarray(m.bias.detach().numpy())) for m in layers]


def _mlp(layers: Any, x: Any) -> Any:
    import jax.numpy as jnp

    for w, b in layers[:-1]:
        x = jnp.tanh(x @ w + b)
    return x @ layers[-1][0] + layers[-1][1]


def _pair(kind: str, s: Settings) -> tuple[Any, Any]:
    """(model, guide) of NumPyro, with the networks' weights as parameters."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    torch_pair: Any = build(kind, s)
    two = kind == "two layers"
    nets = torch_pair.networks if two else {"encoder": torch_pair.posterior.net, "decoder": torch_pair.likelihood.net}
    start = {name: weights(net) for name, net in nets.items()}

    def net(name: str, x: Any) -> Any:
        return _mlp(numpyro.param(name, start[name]), x)

    def normal(name: str, x: Any) -> Any:
        loc, log_scale = jnp.split(net(name, x), 2, -1)
        return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            if two:
                z2 = numpyro.sample("z2", dist.Normal(jnp.zeros(s.latent // 2), 1.0).to_event(1))
                z = numpyro.sample("z1", normal("above", z2))
            else:
                z = numpyro.sample("z", dist.Normal(jnp.zeros(s.latent), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=net("decoder", z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z1" if two else "z", normal("encoder", x))
            if two:
                numpyro.sample("z2", normal("second", z))

    return model, guide


def numpyro_step(kind: str, s: Settings, particles: int, scanned: bool) -> Timed:
    """Seconds per step of a jitted `svi.update`, or of an epoch of them under `lax.scan`."""
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

    batch, steps = jnp.asarray(data(kind, s.batch).numpy()), s.steps_of(particles)
    loss = RenyiELBO(alpha=0, num_particles=particles) if particles > 1 else Trace_ELBO()
    svi = SVI(*_pair(kind, s), numpyro.optim.Adam(1e-3), loss)
    state = svi.init(jax.random.PRNGKey(0), batch)
    if scanned:

        @functools.partial(jax.jit, donate_argnums=0)
        def epoch(state: Any, batches: Any) -> Any:
            return jax.lax.scan(lambda state, x: svi.update(state, x), state, batches)

        batches = jnp.broadcast_to(batch, (steps, *batch.shape)) + 0.0

        def run() -> float:
            nonlocal state
            start = time.perf_counter()
            state, losses = epoch(state, batches)
            losses.block_until_ready()
            return (time.perf_counter() - start) / steps

        run()
        return run
    update = jax.jit(svi.update, donate_argnums=0)

    def one(x: Any) -> None:
        nonlocal state
        state, value = update(state, x)
        float(value)

    one(batch)
    return per_step(one, batch, steps)


def jax_log_px(s: Settings) -> Timed:
    """Microseconds per (datum, particle) of importance sampling in jitted jax, 100 data and 50 particles at a time."""
    import jax
    import jax.numpy as jnp

    pair: Any = build("one layer", s)
    encoder, decoder = weights(pair.posterior.net), weights(pair.likelihood.net)
    x, width = jnp.asarray(data("one layer", s.num_eval).numpy()), min(50, s.particles)

    @jax.jit
    def cell(key: Any, batch: Any) -> Any:
        loc, log_scale = jnp.split(_mlp(encoder, batch), 2, -1)
        noise = jax.random.normal(key, (width, *loc.shape))
        z = loc + jnp.exp(log_scale) * noise
        logits = _mlp(decoder, z)
        log_lik = -jnp.sum(jax.nn.softplus(logits) - batch * logits, -1)
        return log_lik + jnp.sum(0.5 * noise**2 - 0.5 * z**2 + log_scale, -1)

    def run() -> float:
        start, key = time.perf_counter(), jax.random.PRNGKey(0)
        for first in range(0, len(x), 100):
            parts = []
            for _ in range(0, s.particles, width):
                key, sub = jax.random.split(key)
                parts.append(cell(sub, x[first : first + 100]))
            (jax.nn.logsumexp(jnp.concatenate(parts), 0) - math.log(s.particles)).block_until_ready()
        return (time.perf_counter() - start) / (len(x) * s.particles) * 1e6

    run()
    return run


def pythae_step(s: Settings, particles: int) -> Timed:
    """Seconds per step of Pythae's VAE or IWAE model in the loop that its trainer runs."""
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    pair: Any = build("one layer", s)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = pair.posterior.net

        def forward(self, x: torch.Tensor) -> Any:
            loc, log_scale = self.net(x).chunk(2, dim=-1)
            return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = pair.likelihood.net

        def forward(self, z: torch.Tensor) -> Any:
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    common = {"input_dim": (784,), "latent_dim": s.latent, "reconstruction_loss": "bce"}
    if particles > 1:
        model: Any = IWAE(IWAEConfig(number_samples=particles, **common), Encoder(), Decoder())
    else:
        model = VAE(VAEConfig(**common), Encoder(), Decoder())
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)

    def one(x: torch.Tensor) -> None:
        value = model({"data": x}).loss
        adam.zero_grad()
        value.backward()
        adam.step()
        value.item()

    return per_step(one, data("one layer", s.batch), s.steps_of(particles))


def contenders(s: Settings, threads: int) -> dict[tuple[str, str], functools.partial[Timed]]:
    """Set-up functions by (row of the table, contender)."""
    many, out = f"IWAE-{s.iwae} step", {}
    if installed("numpyro"):
        if threads == 1:
            one_thread()
        jitted = {"VAE step": ("one layer", 1), many: ("one layer", s.iwae), "hierarchical step": ("two layers", 1)}
        for what, (kind, k) in jitted.items():
            out[what, "NumPyro jitted"] = functools.partial(numpyro_step, kind, s, k, False)
            out[what, "NumPyro scanned"] = functools.partial(numpyro_step, kind, s, k, True)
        out["log p(x)", "jax jitted"] = functools.partial(jax_log_px, s)
    if installed("pythae"):
        for what, k in (("VAE step", 1), (many, s.iwae)):
            out[what, "Pythae"] = functools.partial(pythae_step, s, k)
    return out
