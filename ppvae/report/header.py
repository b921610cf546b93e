"""The top of the report: headline numbers, remarks, and a table of facts."""

import math
from typing import Any

from ppvae.errors import PpvaeError
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.reliability import FILTER_METHOD, format_particles
from ppvae.plots.style import number
from ppvae.report.annealing_section import annealing_cards, annealing_remarks
from ppvae.report.html import Card, PageHeader
from ppvae.report.run_data import RunData, SectionUnavailable
from ppvae.report.samples_section import active_dims
from ppvae.report.section import as_sentence
from ppvae.training.run import versions


def page_header(run_data: RunData) -> PageHeader:
    """Title, headline numbers, remarks and facts."""
    name, _ = run_data.pair
    est, metrics = run_data.estimate, run_data.run.metrics
    cards = _estimate_cards(est) if est is not None else _training_cards(metrics)
    cards += annealing_cards(run_data)
    dataset = getattr(run_data.columns[0], "name", None)
    short = name.rsplit("/", 1)[-1]
    title = f"{short} on {dataset}" if dataset else short
    calm = est is not None and bool(est.reliable.all()) and not (est.lower_bound_only or est.joint or run_data.mismatch)
    return PageHeader(title, run_data.description, cards, remarks(run_data), facts(run_data), alarm=not calm)


def _estimate_cards(est: Estimate) -> list[Card]:
    """NLL, bits per dim, ELBO and the number of unreliable data."""
    unit = "nats for the whole data set" if est.joint else "nats per datum"
    error = "" if math.isnan(est.nll_std_error) else f"± {number(est.nll_std_error, 3)}"
    guide = est.guide_estimate or est
    elbo = float(est.elbo.mean())
    gap = f"{number(-est.nll - elbo, 3)} nats below {'' if est.joint else 'mean '}log p(x)"
    beside = []
    if guide is not est:
        label, spread = f"NLL by L_{guide.num_particles} of the guide", number(guide.nll_std_error, 3)
        share = f"reliable for {100 * float(guide.reliable.double().mean()):.1f} % of the data"
        beside = [Card(label, number(guide.nll, 3), "" if math.isnan(guide.nll_std_error) else f"± {spread}", share)]
    return [
        Card("Negative log-likelihood", number(est.nll, 3), error, unit),
        *beside,
        Card("Bits per dim", number(est.bits_per_dim, 3), "", est.base_measure),
        Card("ELBO", number(elbo, 3), "", gap),
        _reliability_card(est),
    ]


def _reliability_card(est: Estimate) -> Card:
    bad, count = int((~est.reliable).sum()), len(est.log_px)
    if est.joint:
        return Card("Reliable", "no" if bad else "yes", "", "one estimate for the whole data set", bad > 0)
    return Card("Unreliable estimates", f"{bad}", f"of {count}", f"{100 * bad / count:.1f} % of the data", bad > 0)


def _training_cards(metrics: dict[str, Any]) -> list[Card]:
    """The last metrics of training, for a report without an estimate."""
    labels = {
        "valid_elbo": "Validation ELBO", "train_elbo": "Training ELBO", "valid_rate": "Rate", "train_rate": "Rate",
        "valid_distortion": "Distortion", "train_distortion": "Distortion", "loss": "Loss",
    }  # fmt: skip
    return [
        Card(label, number(metrics[key], 3), "", "nats per datum") for key, label in labels.items() if key in metrics
    ]


def remarks(run_data: RunData) -> list[str]:
    """Warnings about the numbers, and notes of the estimates."""
    est = run_data.estimate
    if est is None:
        return [run_data.no_estimate, *annealing_remarks(run_data)]
    out = [as_sentence(f"verdict: {est.verdict}")]
    if bool((~est.reliable).any()):
        out.append(as_sentence(est.reliability.summary))
    if todo := est.reliability.recommendation:
        out.append(f"What to do: {todo}.")
    if est.lower_bound_only:
        out.append("The guide has a point mass on a discrete latent: the estimates are only lower bounds on log p(x).")
    if est.joint:
        out.append("A latent is global: weights are joint, and log p(x) is that of the whole data set.")
    out += [*(as_sentence(text) for text in est.notes), *annealing_remarks(run_data)]
    return [*out, run_data.mismatch] if run_data.mismatch and not est.joint else out


def facts(run_data: RunData) -> list[tuple[str, str]]:
    """The table: pair, data, estimate, training and versions."""
    name, modules = run_data.pair
    size = f"{run_data.num_parameters:,} parameters"
    rows = [("Model and guide", f"{name}{f' ({modules})' if modules else ''}, {size}"), ("Data", _data(run_data))]
    if run_data.estimate is not None:
        rows.append(("log p(x)", _method(run_data.estimate)))
        if bracket := run_data.estimate.bracket_summary:
            rows.append(("Bracket", bracket))
    found = run_data.run.config.get("versions") or versions()
    text = ", ".join(f"{package} {version}" for package, version in found.items())
    return [*rows, *_active_latents(run_data), *_training(run_data), ("Versions", text)]


def _data(run_data: RunData) -> str:
    shape = "×".join(map(str, run_data.event or run_data.columns[0].shape[1:]))
    guess = ", shown as images because of their size" if run_data.event_guessed else ""
    low, high = run_data.limits
    scale = ""
    if run_data.event and run_data.limits != (0.0, 1.0):
        scale = f", shown from {number(low)} (black) to {number(high)} (white)"
    digest = run_data.digest[:12]
    return f"{run_data.description}; {len(run_data):,} data of {shape}{guess}{scale}; SHA-256 {digest}"


def _method(est: Estimate) -> str:
    error = float(est.std_error.nanmedian())
    median = "" if est.joint else " (median over data)"
    monte_carlo = "" if math.isnan(error) else f"; Monte-Carlo standard error {error:.4f} nats{median}"
    spread = "" if math.isnan(est.nll_std_error) else "; ± is the standard error of the mean over the data"
    chains = est.method not in ("importance sampling", FILTER_METHOD)
    draws = f"{est.num_particles:,} chains" if chains else f"K = {format_particles(est.particles, ',')} particles"
    source = "" if chains else f" from {'refined proposals' if est.settings.get('proposal') else 'the guide'}"
    how = f"{est.method}{source} with {draws}, seed {est.seed}"
    return f"{how}, which underestimates log p(x) on average{monte_carlo}{spread}"


def _active_latents(run_data: RunData) -> list[tuple[str, str]]:
    try:
        text = "; ".join(f"{site}: {active_dims(run_data, site)}" for site in run_data.means)
    except (SectionUnavailable, PpvaeError):
        return []
    return [("Active latents", text)] if text else []


def _training(run_data: RunData) -> list[tuple[str, str]]:
    fit, history = run_data.run.config.get("fit", {}), run_data.run.history
    rows = []
    if fit:
        data = f"{fit.get('data') or 'a tensor'}; {fit.get('num_data', 0):,} data; SHA-256 {fit.get('digest', '')[:12]}"
        settings = f"{fit.get('objective')}, {fit.get('optimizer')}, batch size {fit.get('batch_size')}, "
        settings += f"seed {fit.get('seed')}"
        settings += f", schedule {fit['scheduler']}" if fit.get("scheduler") else ""
        rows += [("Training data", data), ("Training settings", settings)]
    if history:
        seconds, last = sum(m.get("seconds", 0.0) for m in history), history[-1]
        labels = {
            "loss": "loss",
            "valid_elbo": "validation ELBO",
            "valid_rate": "rate",
            "valid_distortion": "distortion",
        }
        numbers = ", ".join(f"{label} {number(last[key], 3)}" for key, label in labels.items() if key in last)
        rows.append(("Epochs", f"{last.get('epoch', len(history))} in {seconds:.1f} s; last epoch: {numbers}"))
    return rows
