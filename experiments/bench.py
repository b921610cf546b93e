"""Times a training step of `fit` and of a hand-written loop, and log p(x) by both, side by side in one run.

The network is 784-200-200-(50)-200-200-784 with tanh, batch 100, Adam, float32. Rounds are interleaved; medians and
ratios are printed with the machine and the thread count, and written as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ppvae import VAE, fit, likelihoods, log_marginal, nn, posteriors, priors


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    rounds: int = 7
    num_data: int = 10_000
    batch: int = 100
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


def hand_written_epoch(s: Settings, x: Tensor) -> Callable[[], float]:
    """Seconds per step of the loop that a researcher writes by hand: one draw, reparameterised, Adam."""
    vae = build(s)
    encoder, decoder = vae.posterior.net, vae.likelihood.net
    adam = torch.optim.Adam(vae.parameters(), lr=1e-3)

    def run() -> float:
        start = time.perf_counter()
        steps = 0
        for rows in torch.randperm(len(x)).split(s.batch):
            batch = x[rows]
            loc, log_scale = encoder(batch).chunk(2, dim=-1)
            z = loc + log_scale.exp() * torch.randn_like(loc)
            log_lik = -F.binary_cross_entropy_with_logits(decoder(z), batch, reduction="none").sum(-1)
            kl = (0.5 * (loc**2 + (2 * log_scale).exp()) - log_scale - 0.5).sum(-1)
            loss = (kl - log_lik).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            loss.item()
            steps += 1
        return (time.perf_counter() - start) / steps

    return run


def fit_epoch(s: Settings, x: Tensor) -> Callable[[], float]:
    """Seconds per step of `fit`, its per-epoch monitoring included, its set-up not."""
    vae = build(s)

    def run() -> float:
        metrics = fit(vae.model, vae.guide, x, epochs=1, batch_size=s.batch, progress=False).metrics
        return metrics["seconds"] / metrics["step"]

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
    """Microseconds per (datum, particle) of `log_marginal`, everything that it reports included."""
    vae = build(s)

    def run() -> float:
        start = time.perf_counter()
        log_marginal(vae.model, vae.guide, x, num_particles=s.particles, progress=False)
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
    s = Settings(rounds=1, num_data=300, eval_data=10, particles=100) if args.smoke else Settings()
    generator = torch.Generator().manual_seed(0)
    x = torch.bernoulli(torch.full((s.num_data, 784), 0.13), generator=generator)
    timed = {
        ("step", "hand-written"): hand_written_epoch(s, x),
        ("step", "fit"): fit_epoch(s, x),
        ("log p(x)", "hand-written"): hand_written_log_px(s, x[: s.eval_data]),
        ("log p(x)", "log_marginal"): library_log_px(s, x[: s.eval_data]),
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
        shown = f"{median * 1e3:8.2f} ms per step" if what == "step" else f"{median:8.2f} us per (datum, particle)"
        print(f"{what:10} {who:14} {shown:32} {ratio:5.2f} of hand-written")
        rows.append({"what": what, "who": who, "median": median, "ratio": ratio, "all": times[(what, who)]})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": asdict(s), "machine": processor(), "threads": args.threads, "rows": rows}
    args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
