"""Times training steps and log p(x), captured, compiled, eager, of Pyro and hand-written, side by side in one run.

The network is 784-200-200-(50)-200-200-784 with tanh, batch 100, Adam, float32. Rounds are interleaved; medians and
ratios are printed with the machine and the thread count, and written as JSON. "products" are the float32 matrix
products of one step alone, by torch: what no arrangement of the rest can beat without beating them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor

from ppvae import VAE, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.evaluation.accumulate import Weights, recorded_bounds
from ppvae.evaluation.compiled import Cells
from ppvae.evaluation.marginal import DATA_BLOCK, PARTICLE_BLOCK
from ppvae.inference import inspect
from ppvae.inference.svi import SVI

KERNELS = ("eager", "graph", "compiled")


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    rounds: int = 7
    num_data: int = 10_000
    batch: int = 100
    steps: int = 100  # in a round; fewer by the number of particles
    iwae: int = 50
    eval_data: int = 200
    particles: int = 1000
    latent: int = 50
    hidden: tuple[int, ...] = (200, 200)


def build(s: Settings) -> VAE:
    """The VAE of the IWAE paper's one-layer network."""
    torch.manual_seed(0)
    return VAE(
        prior=priors.StandardNormal(s.latent),
        likelihood=likelihoods.Bernoulli(nn.mlp(s.latent, 784, hidden=s.hidden)),
        posterior=posteriors.DiagonalNormal(nn.mlp(784, 2 * s.latent, hidden=s.hidden)),
    )


def hand_written_step(s: Settings, x: Tensor, particles: int) -> Callable[[], float]:
    """Seconds per step of the loop that a researcher writes by hand: the ELBO of one draw or the IWAE bound, Adam."""
    vae = build(s)
    encoder, decoder = vae.posterior.net, vae.likelihood.net
    adam = torch.optim.Adam(vae.parameters(), lr=1e-3)

    def step(batch: Tensor) -> None:
        loc, log_scale = encoder(batch).chunk(2, dim=-1)
        noise = torch.randn(particles, *loc.shape) if particles > 1 else torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        logits = decoder(z)
        targets = batch.expand_as(logits)
        log_lik = -F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
        if particles > 1:
            log_weight = log_lik + (0.5 * noise**2 - 0.5 * z**2 + log_scale).sum(-1)
            loss = math.log(particles) - log_weight.logsumexp(0).mean()
        else:
            loss = ((0.5 * (loc**2 + (2 * log_scale).exp()) - log_scale - 0.5).sum(-1) - log_lik).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        loss.item()

    return per_step(s, x, step, particles)


def per_step(s: Settings, x: Tensor, step: Callable[[Tensor], Any], particles: int) -> Callable[[], float]:
    """Seconds per step over some batches."""
    batches = x.split(s.batch)[: max(1, s.steps // particles)]

    def run() -> float:
        start = time.perf_counter()
        for batch in batches:
            step(batch)
        return (time.perf_counter() - start) / len(batches)

    return run


def library_step(s: Settings, x: Tensor, particles: int, kernels: str) -> Callable[[], float]:
    """Seconds per step of `ppvae.inference.SVI`, its graph already made."""
    vae = build(s)
    loss = objectives.IWAE(particles) if particles > 1 else objectives.ELBO()
    svi = SVI(vae.model, vae.guide, functools.partial(torch.optim.Adam, lr=1e-3), loss)
    svi.use(kernels, settled=True)
    with pyro.validation_enabled(False):
        for _ in range(3):
            svi.step(x[: s.batch])
    if svi.kernels != kernels:
        raise RuntimeError(f"expected steps by {kernels!r}, found {svi.kernels!r}")

    def step(batch: Tensor) -> None:
        with pyro.validation_enabled(False):
            svi.step(batch)

    return per_step(s, x, step, particles)


def pyro_step(s: Settings, x: Tensor) -> Callable[[], float]:
    """Seconds per step of Pyro's SVI as its VAE example does it."""
    vae = build(s)
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())

    def step(batch: Tensor) -> None:
        with pyro.validation_enabled(False):
            svi.step(batch)

    return per_step(s, x, step, 1)


def products(s: Settings, rows: tuple[int, int], gradients: bool) -> Callable[[], float]:
    """Seconds of the matrix products of encoder rows and decoder rows, forwards and, with gradients, backwards."""
    sizes = [(784, *s.hidden, 2 * s.latent), (s.latent, *s.hidden, 784)]
    made = [
        (torch.randn(count, a), torch.randn(count, b), torch.randn(b, a), side == 0 and i == 0)
        for side, (count, widths) in enumerate(zip(rows, sizes, strict=True)) if count
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    ]  # fmt: skip

    def run() -> float:
        start = time.perf_counter()
        for x, y, w, first in made:
            torch.mm(x, w.T)
            if gradients:
                torch.mm(y.T, x)
                if not first:
                    torch.mm(y, w)
        return time.perf_counter() - start

    return run


def hand_written_log_px(s: Settings, x: Tensor) -> Callable[[], float]:
    """Microseconds per (datum, particle) of importance sampling as written by hand, 50 particles at a time."""
    vae = build(s)
    encoder, decoder = vae.posterior.net, vae.likelihood.net

    @torch.no_grad()
    def run() -> float:
        start = time.perf_counter()
        for batch in x.split(100):
            loc, log_scale = encoder(batch).chunk(2, dim=-1)
            scale, parts = log_scale.exp(), []
            for _ in range(0, s.particles, 50):
                noise = torch.randn(50, *loc.shape)
                z = loc + scale * noise
                logits = decoder(z)
                targets = batch.expand_as(logits)
                log_lik = -F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
                ratio = (0.5 * noise**2 - 0.5 * z**2 + log_scale).sum(-1)
                parts.append(log_lik + ratio)
            torch.cat(parts).logsumexp(0) - math.log(s.particles)
        return (time.perf_counter() - start) / (len(x) * s.particles) * 1e6

    return run


def library_log_px(s: Settings, x: Tensor) -> Callable[[], float]:
    """Microseconds per (datum, particle) of `log_marginal`, everything that it reports included, eagerly."""
    vae = build(s)

    def run() -> float:
        start = time.perf_counter()
        log_marginal(vae.model, vae.guide, x, num_particles=s.particles, progress=False, compile=False)
        return (time.perf_counter() - start) / (len(x) * s.particles) * 1e6

    return run


def compiled_log_px(s: Settings, x: Tensor) -> Callable[[], float]:
    """Microseconds per (datum, particle) of the compiled graph of `log_marginal`, already made, and its reductions."""
    vae, batches = build(s), x.split(DATA_BLOCK)
    structure = inspect(vae.model, vae.guide, (batches[0],))
    cells = Cells(vae.model, vae.guide, structure, PARTICLE_BLOCK, 0)
    with torch.no_grad(), pyro.validation_enabled(False):
        cells.start((batches[0],))
        cells.compile(math.inf)

    @torch.no_grad()
    def run() -> float:
        start = time.perf_counter()
        for batch in batches:
            cells.start((batch,))
            weights = Weights(s.particles, recorded_bounds(s.particles), torch.finfo(torch.float32).eps)
            for _ in range(s.particles // PARTICLE_BLOCK):
                cell = cells()
                if cell is None:
                    raise RuntimeError("expected compiled log-weights, found none")
                weights.add(*cell)
            weights.result()
        return (time.perf_counter() - start) / (len(x) * s.particles) * 1e6

    return run


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of a minute; the figures mean nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    s = Settings(rounds=1, num_data=300, steps=3, iwae=5, eval_data=50, particles=100) if args.smoke else Settings()
    generator = torch.Generator().manual_seed(0)
    x = torch.bernoulli(torch.full((s.num_data, 784), 0.13), generator=generator)
    one, many = "VAE step", f"IWAE-{s.iwae} step"
    evaluated = x[: s.eval_data]
    cell = DATA_BLOCK * PARTICLE_BLOCK
    alone = products(s, (0, cell), False)
    timed = {
        (one, "hand-written"): hand_written_step(s, x, 1),
        (one, "Pyro's SVI"): pyro_step(s, x),
        **{(one, f"ppvae {k}"): library_step(s, x, 1, k) for k in KERNELS},
        (one, "products"): products(s, (s.batch, s.batch), True),
        (many, "hand-written"): hand_written_step(s, x, s.iwae),
        **{(many, f"ppvae {k}"): library_step(s, x, s.iwae, k) for k in KERNELS},
        (many, "products"): products(s, (s.batch, s.batch * s.iwae), True),
        ("log p(x)", "hand-written"): hand_written_log_px(s, evaluated),
        ("log p(x)", "ppvae eager"): library_log_px(s, evaluated),
        ("log p(x)", "ppvae compiled"): compiled_log_px(s, evaluated),
        ("log p(x)", "products"): lambda: alone() / cell * 1e6,
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for round_ in range(s.rounds + 1):
        for key, run in timed.items():
            seconds = run()
            if round_ or args.smoke:  # the first round warms up
                times[key].append(seconds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    rows = []
    print(f"{processor()}, {args.threads} threads, torch {torch.__version__}")
    for (what, who), median in medians.items():
        ratio = median / medians[(what, "hand-written")]
        shown = f"{median * 1e3:8.2f} ms per step" if what != "log p(x)" else f"{median:8.2f} us per (datum, particle)"
        print(f"{what:12} {who:14} {shown:36} {ratio:5.2f} of hand-written")
        rows.append({"what": what, "who": who, "median": median, "ratio": ratio, "all": times[(what, who)]})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": asdict(s), "machine": processor(), "threads": args.threads, "rows": rows}
    args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
