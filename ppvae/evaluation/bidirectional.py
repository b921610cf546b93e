"""Bidirectional Monte Carlo: log p(x) of simulated data between two bounds, a certificate of annealing settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import refused
from ppvae.evaluation.accumulate import Weights
from ppvae.evaluation.annealing_chains import backward, forward
from ppvae.evaluation.annealing_files import Finished
from ppvae.evaluation.annealing_setup import Bar, Session, Settings, session
from ppvae.evaluation.estimate import _number
from ppvae.evaluation.marginal import Block, _columns, _quiet
from ppvae.evaluation.simulated import Assemble, simulated
from ppvae.inference.structure import undisturbed
from ppvae.inference.tracing import Pair


@dataclass(frozen=True)
class Bracket:
    """log p(x) of simulated data from below and from above; nats per datum, float64, all [N].

    Attributes:
        lower: log mean w over forward chains, too low on average.
        upper: -log mean 1/w over reverse chains from the simulated latents themselves, too high on average.
        lower_std_error, upper_std_error: Monte-Carlo standard errors over the chains.
        acceptance: of the forward chains.
        data: the simulated batch, its columns [N, ...].
    """

    lower: Tensor
    upper: Tensor
    lower_std_error: Tensor
    upper_std_error: Tensor
    acceptance: Tensor
    nonfinite: Tensor
    seed: int
    joint: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def gap(self) -> Tensor:
        """upper - lower, [N] nats; on average it bounds the error of either."""
        return self.upper - self.lower

    def summary(self) -> str:
        """The bracket in words.

        >>> one = torch.ones(2).double()
        >>> print(Bracket(-one, -0.9 * one, 0 * one, 0 * one, one, 0 * one, 0).summary())
        log p(x) of 2 simulated data lies between -1.000 and -0.900 nats on average: a gap of 0.100 ± 0.000
        it certifies these settings on data simulated from the model, and says nothing of other data
        """
        count = len(self.lower)
        error = float(self.gap.std()) / count**0.5 if count > 1 else float("nan")
        lines = [
            f"log p(x) of {count} simulated data lies between {float(self.lower.mean()):.3f} and "
            f"{float(self.upper.mean()):.3f} nats on average: a gap of {float(self.gap.mean()):.3f} ± {error:.3f}"
        ]
        if int((self.nonfinite > 0).sum()):
            lines.append(f"{int((self.nonfinite > 0).sum())} data have non-finite weights")
        lines.append("it certifies these settings on data simulated from the model, and says nothing of other data")
        return "\n".join(lines)

    def per_datum(self) -> dict[str, Tensor]:
        """Every per-datum quantity by name, [N]."""
        names = ("lower", "upper", "lower_std_error", "upper_std_error", "gap", "acceptance", "nonfinite")
        return {name: getattr(self, name) for name in names}

    def attributes(self) -> dict[str, Any]:
        """What the bracket is of and how it was made, as strings and numbers."""
        return {
            "method": "bidirectional Monte Carlo", "on": "data simulated from the model", "seed": self.seed,
            "num_data": len(self.lower), "joint": self.joint, "lower": float(self.lower.mean()),
            "upper": float(self.upper.mean()), "gap": float(self.gap.mean()), **self.settings,
        }  # fmt: skip

    def save(self, directory: str | os.PathLike[str], name: str = "bdmc") -> Path:
        """Writes `<name>.json`, numbers and per-datum values, whole or not at all."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        content = {key: _number(value) for key, value in self.attributes().items()} | {
            "summary": self.summary().splitlines(),
            "per_datum": {key: [_number(v) for v in value.tolist()] for key, value in self.per_datum().items()},
        }
        partial = path.with_suffix(".json.tmp")
        partial.write_text(json.dumps(content, allow_nan=False) + "\n")
        os.replace(partial, path)
        return path


def bdmc(
    model: Pair,
    guide: Pair,
    data: Any,
    *,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    start: str = "guide",
    schedule: str | Sequence[float] | Tensor = "sigmoid",
    num_leapfrog: int = 10,
    target_acceptance: float = 0.8,
    seed: int = 0,
    rows: int | None = None,
    assemble: Assemble | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Bracket:
    """Bidirectional Monte Carlo: brackets log p(x) on data simulated from the model, to certify `annealed`'s settings.

    A latent that was simulated together with x is a draw of p(z | x), so that chains can run from it back to the start
    density: forward chains give E[w] = p(x) and so a lower bound on average, reverse chains E[1 / w] = 1 / p(x) and so
    an upper bound. The mean gap bounds the mean error of either, on simulated data only.

    Args:
        model, guide: a Pyro pair with continuous latents, as `annealed` takes it.
        data: gives the shapes, and whatever the model is conditioned on; its observed values are replaced.
        assemble: (simulated values by site, batch) -> batch with these in it; for a pair whose observed sites are not
            simply columns of the batch.
        num_chains, num_temperatures, start, schedule, num_leapfrog, target_acceptance, rows, device, progress: as
            `annealed` takes them; forward and reverse chains share the pilot's step sizes and schedule.
        seed: of the simulated data and of every draw.

    Raises:
        ContractError: simulated values cannot be put into the batch, or the pair cannot be annealed, by the site's
            name; UsageError, DataError: bad arguments or data.

    Source: Grosse, Ghahramani and Adams 2015 (arXiv 1511.02543); Grosse, Ancha and Roy 2016 (arXiv 1606.02275).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.zeros(6, 3).double()
    >>> bracket = bdmc(pair.model, pair.mean_field, x, num_temperatures=50)
    >>> exact = pair.log_px(bracket.data[0])
    >>> bool((exact - bracket.lower).abs().max() < 0.2), bool((bracket.upper - exact).abs().max() < 0.2)
    (True, True)
    """
    settings = Settings(
        num_chains, num_temperatures, start, schedule, num_leapfrog, target_acceptance, seed, rows
    )  # fmt: skip
    columns = _columns(data, seed)
    with undisturbed(), session(model, guide, columns, settings, device) as ready:
        for name, role in ready.s.guide_roles.items():
            if role in ("auxiliary", "enumerated"):
                raise refused(
                    name, "a guide whose own draws are the latents, to start a chain at given ones",
                    "a helper" if role == "auxiliary" else "a site enumerated in the guide",
                    "use start='prior'" if role == "auxiliary" else "enumerate it in the model instead",
                )  # fmt: skip
        results: list[dict[str, Tensor]] = []
        batches: list[tuple[Tensor, ...]] = []
        with Bar(ready.blocks, 2 * len(settings.chain_blocks), settings, _quiet(progress), "BDMC") as bar:
            for number in range(ready.blocks):
                ready.noise(number, "simulated")
                block, latents = simulated(ready.model, ready.s, ready.block(number), assemble)
                batches.append(_rows_of(block))
                results.append(_of_block(ready, block, latents, bar))
                gap = torch.cat([r["upper"] - r["lower"] for r in results]).mean()
                bar.say(gap=f"{gap:.3f}")
    joined = {name: torch.cat([r[name] for r in results]) for name in results[0]}
    own = tuple(torch.cat([b[i] for b in batches]).cpu() for i in range(len(columns)))
    attributes = {k: v for k, v in settings.attributes().items() if k != "resample"}
    return Bracket(**joined, seed=seed, joint=ready.s.joint, settings=attributes, data=own)


def _of_block(ready: Session, block: Block, latents: Mapping[str, Tensor], bar: Bar) -> dict[str, Tensor]:
    """Both bounds for one block of simulated data."""
    settings, number = ready.settings, block.number
    density = ready.density(block)
    plan = ready.plan(density, number, Finished(None, {}), bar)
    width = 1 if ready.s.joint else block.size
    both = {"lower": Weights(settings.num_chains, [], block.eps), "upper": Weights(settings.num_chains, [], block.eps)}
    acceptance = torch.zeros(width, dtype=torch.float64)
    for i, count in enumerate(settings.chain_blocks):
        noise = ready.noise(number, i)
        chains = forward(plan, density.start(count), 0.0, noise, bar.update)
        both["lower"].add(chains.log_weight[:, :width], chains.log_weight[:, :width])
        acceptance = acceptance + chains.acceptance[:width].cpu() * count / settings.num_chains
        back = backward(plan, density.single(latents, count), ready.noise(number, i, "reverse"), bar.update)
        both["upper"].add(-back[:, :width], -back[:, :width])
    lower, upper = ({k: v.cpu() for k, v in weights.result().items()} for weights in both.values())
    return {
        "lower": lower["log_px"], "lower_std_error": lower["std_error"], "acceptance": acceptance,
        "upper": -upper["log_px"], "upper_std_error": upper["std_error"],
        "nonfinite": lower["nonfinite"] + upper["nonfinite"],
    }  # fmt: skip


def _rows_of(block: Block) -> tuple[Tensor, ...]:
    """The block's own rows of its batch."""
    return tuple((t if block.index is None else t[block.index])[: block.size] for t in block.batch)
