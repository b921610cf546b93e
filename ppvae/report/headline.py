"""The numbers that come first in a report."""

from __future__ import annotations

import math
from typing import Any

from ppvae.errors import PpvaeError
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.reliability import format_particles
from ppvae.plots.style import number
from ppvae.report import of_chains
from ppvae.report.of_pair import active
from ppvae.report.page import Card, Head
from ppvae.report.subject import LeftOut, Subject


def head(s: Subject) -> Head:
    """Title, headline numbers, remarks and facts."""
    name, _ = s.pair
    cards = of_estimate(s.estimate) if s.estimate is not None else of_history(s.run.metrics)
    cards += of_chains.cards(s)
    known = getattr(s.columns[0], "name", None)
    short = name.rsplit("/", 1)[-1]
    title = f"{short} on {known}" if known else short
    return Head(title, s.description, cards, remarks(s), facts(s))


def of_estimate(est: Estimate) -> list[Card]:
    """NLL, bits per dim, ELBO and how many data cannot be trusted."""
    unit = "nats for the whole data set" if est.joint else "nats per datum"
    error = "" if math.isnan(est.nll_std_error) else f"± {number(est.nll_std_error, 3)}"
    elbo = float(est.elbo.mean())
    return [
        Card("Negative log-likelihood", number(est.nll, 3), error, unit),
        Card("Bits per dim", number(est.bits_per_dim, 3), "", est.base_measure),
        Card(
            "ELBO",
            number(elbo, 3),
            "",
            f"{number(-est.nll - elbo, 3)} nats below {'' if est.joint else 'mean '}log p(x)",
        ),
        _trust(est),
    ]


def _trust(est: Estimate) -> Card:
    bad, count = int((~est.reliable).sum()), len(est.log_px)
    if est.joint:
        return Card("To be trusted", "no" if bad else "yes", "", "one estimate for the whole data set", bad > 0)
    return Card("Not to be trusted", f"{bad}", f"of {count}", f"{100 * bad / count:.1f} % of the data", bad > 0)


def of_history(metrics: dict[str, Any]) -> list[Card]:
    """What training itself knows, where there is no estimate."""
    names = {
        "valid_elbo": "Validation ELBO", "train_elbo": "Training ELBO", "valid_rate": "Rate", "train_rate": "Rate",
        "valid_distortion": "Distortion", "train_distortion": "Distortion", "loss": "Loss",
    }  # fmt: skip
    return [Card(name, number(metrics[key], 3), "", "nats per datum") for key, name in names.items() if key in metrics]


def remarks(s: Subject) -> list[str]:
    """What a reader must know before using the numbers."""
    est = s.estimate
    if est is None:
        return [s.no_estimate, *of_chains.remarks(s)]
    out = []
    if bool((~est.reliable).any()):
        out.append(_sentence(est.reliability.summary))
    if todo := est.reliability.recommendation:
        out.append(_sentence(f"what to do: {todo}"))
    if est.lower_bound_only:
        out.append("The guide has a point mass on a discrete latent: these are lower bounds on log p(x) only.")
    if est.joint:
        out.append("A latent is shared by all data: weights are joint, and log p(x) is that of the whole data set.")
    out += [*(_sentence(text) for text in est.notes), *of_chains.remarks(s)]
    return [*out, s.matched] if s.matched and not est.joint else out


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def facts(s: Subject) -> list[tuple[str, str]]:
    """The table: pair, data, estimate, training and versions."""
    name, parts = s.pair
    rows = [("Pair", f"{name}{f' ({parts})' if parts else ''}, {s.num_parameters:,} parameters")]
    rows.append(("Data", _data(s)))
    if s.estimate is not None:
        rows.append(("log p(x)", _estimated(s.estimate)))
    rows += [("Active latents", text) for text in _active(s)]
    return [*rows, *_training(s), ("Versions", _versions(s))]


def _data(s: Subject) -> str:
    shape = "×".join(map(str, s.event)) if s.event else "×".join(map(str, s.columns[0].shape[1:]))
    guess = ", taken for images by their size" if s.guessed else ""
    low, high = s.limits
    shown = (
        f", shown from {number(low)} (black) to {number(high)} (white)" if s.event and s.limits != (0.0, 1.0) else ""
    )
    return f"{s.description}; {len(s):,} data of {shape}{guess}{shown}; SHA-256 {s.digest[:12]}"


def _estimated(est: Estimate) -> str:
    error = float(est.std_error.nanmedian())
    median = "" if est.joint else " (median over data)"
    monte_carlo = "" if math.isnan(error) else f"; Monte-Carlo standard error {error:.4f} nats{median}"
    spread = "" if math.isnan(est.nll_std_error) else "; ± is the standard error of the mean over the data"
    chains = est.method != "importance sampling"
    how = f"{est.num_particles:,} chains" if chains else f"K = {format_particles(est.particles, ',')} particles"
    return f"{est.method} with {how}, seed {est.seed}, which underestimates log p(x) on average{monte_carlo}{spread}"


def _active(s: Subject) -> list[str]:
    try:
        return ["; ".join(f"{site}: {active(s, site)}" for site in s.means)] if s.means else []
    except (LeftOut, PpvaeError):
        return []


def _training(s: Subject) -> list[tuple[str, str]]:
    fit, history = s.run.config.get("fit", {}), s.run.history
    rows = []
    if fit:
        what = f"{fit.get('data') or 'a tensor'}; {fit.get('num_data', 0):,} data; SHA-256 {fit.get('digest', '')[:12]}"
        how = f"{fit.get('objective')}, {fit.get('optimizer')}, batches of {fit.get('batch_size')}, "
        how += f"seed {fit.get('seed')}"
        schedule = f", schedule {fit['scheduler']}" if fit.get("scheduler") else ""
        rows += [("Trained on", what), ("Trained with", how + schedule)]
    if history:
        seconds = sum(m.get("seconds", 0.0) for m in history)
        last = {"loss": "loss", "valid_elbo": "validation ELBO", "valid_rate": "rate", "valid_distortion": "distortion"}
        words = ", ".join(f"{text} {number(history[-1][key], 3)}" for key, text in last.items() if key in history[-1])
        rows.append(("Epochs", f"{history[-1].get('epoch', len(history))} in {seconds:.1f} s; at the end {words}"))
    return rows


def _versions(s: Subject) -> str:
    from ppvae.training.run import versions

    found = s.run.config.get("versions") or versions()
    return ", ".join(f"{name} {version}" for name, version in found.items())
