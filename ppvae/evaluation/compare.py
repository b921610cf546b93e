"""Comparison of models by log p(x): paired differences on the same data, with warnings where a ranking is doubtful."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import UsageError, count_of
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_ranges
from ppvae.evaluation.estimate import MIXED_METHOD, Estimate
from ppvae.evaluation.results import SaveableResult, load_estimate, mean_and_error, mean_words
from ppvae.inference.structure import NOT_NORMALIZED

MAX_UNRELIABLE_DIFFERENCE = 0.01  # of the shares of unreliable data of two models, without a warning
MIN_RUNS = 3  # of a method, for a difference between methods rather than between runs


def _method(estimate: Estimate) -> str:
    """Method and settings of an estimate as a string; estimates of equal tightness have equal strings."""
    settings = {"num_particles": estimate.num_particles, **estimate.settings}
    method = MIXED_METHOD if "next_rung" in estimate.settings else estimate.method  # whether any datum needed it or not
    same = {k: v for k, v in settings.items() if k != "seed" and not k.startswith("bracket")}  # which is a result
    return f"{method}, " + ", ".join(f"{k} {v}" for k, v in same.items())


@dataclass(frozen=True)
class Comparison(SaveableResult):
    """Models compared on the same data, best first; nats per datum.

    Attributes:
        names: of the M models.
        log_px: [M, N], averaged over the runs of a model.
        runs: the number of runs of each model, [M].
        run_means: [M, most runs], the mean log p(x) of each run; NaN where there is none.
        unreliable: [M], the share of unreliable data.
        methods: the estimator of log p(x) and its settings, per model.
        warnings: reasons to doubt the differences.
    """

    names: tuple[str, ...]
    log_px: Tensor
    runs: Tensor
    run_means: Tensor
    unreliable: Tensor
    methods: tuple[str, ...]
    base_measure: str
    data: str
    digest: str
    warnings: tuple[str, ...] = ()

    def difference(self, name: str, other: str) -> tuple[float, float]:
        """(mean log p(x) of `name` minus that of `other`, its standard error); nats per datum.

        The error is sqrt(paired variance over data / N + variance over runs / runs of either), the latter where a model
        has two runs or more; NaN for a single datum.
        """
        a, b = self._index(name), self._index(other)
        paired = self.log_px[a] - self.log_px[b]
        variance = float(paired.var()) / len(paired) if len(paired) > 1 else math.nan
        for i in (a, b):
            if self.runs[i] > 1:
                variance += float(self.run_means[i, : int(self.runs[i])].var()) / int(self.runs[i])
        return float(paired.mean()), math.sqrt(variance)

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise UsageError(f"name: expected one of {', '.join(self.names)}; found {name!r}")
        return self.names.index(name)

    def verdict(self, name: str, other: str) -> str:
        """Whether `name` is better or worse, in words: decided beyond two standard errors, and over how many seeds.

        Models trained once differ by chance, so that fewer than three seeds each decide on these runs alone.
        """
        delta, error = self.difference(name, other)
        if not abs(delta) > 2 * error:
            return "not decided: within two standard errors"
        what = "better" if delta > 0 else "worse"
        fewest = int(min(self.runs[self._index(name)], self.runs[self._index(other)]))
        if fewest >= MIN_RUNS:
            return f"{what}; decided over {fewest} seeds"
        return f"{what} in these runs; {MIN_RUNS} seeds of each would decide between the methods"

    def table(self) -> dict[str, str]:
        """A line for every model, best first, with its difference from the best, and the warnings."""
        rows = {"data": f"{self.data or 'a tensor'}, {count_of(self.log_px.shape[1])}, {self.base_measure}"}
        for i, name in enumerate(self.names):
            words = f"log p(x) {mean_words(self.log_px[i])}"
            if self.runs[i] > 1:
                words += f" ({count_of(int(self.runs[i]), 'run')})"
            if i:
                delta, error = self.difference(name, self.names[0])
                words += f", {delta:+.3f} ± {error:.3f} from {self.names[0]}: {self.verdict(name, self.names[0])}"
            rows[name] = words + f"; {100 * float(self.unreliable[i]):.1f} % unreliable"
        return rows | {f"warning {i}": text for i, text in enumerate(self.warnings, 1)}

    def to_arviz(self) -> Any:
        """The data frame of `arviz.compare` for the per-datum log p(x): stacking weights and differences.

        The test set's log p(x) serves as the expected log predictive density, with p_loo zero. The standard errors do
        not include the variance over runs. `arviz.loo` and `arviz.waic` do not apply: they leave a datum out of draws
        of global parameters, whereas each datum here has latents of its own.
        """
        import arviz as az
        import xarray

        # stacking takes exp(log p(x)), which underflows; a common offset does not change its weights
        common, count = self.log_px.amax(0), self.log_px.shape[1]
        found = {}
        for i, name in enumerate(self.names):
            log_px = self.log_px[i]
            pointwise = xarray.DataArray((log_px - common).numpy(), dims=("datum",))
            total, error = float(log_px.sum()), float(log_px.std() * math.sqrt(count))
            found[name] = _elpd(az, total, error, pointwise, bool(self.unreliable[i] > 0))
        if int(az.__version__.split(".")[0]) > 0:
            whole = {"round_to": "none"} if "round_to" in inspect.signature(az.compare).parameters else {}
            return az.compare(found, method="stacking", **whole)
        return az.compare(found, ic="loo", method="stacking")


def _elpd(az: Any, total: float, error: float, pointwise: Any, warning: bool) -> Any:
    """The log p(x) of a model as `ELPDData`, whose fields have other names in ArviZ 1.x."""
    common = {"se": error, "n_samples": 1, "n_data_points": pointwise.size, "scale": "log", "warning": warning}
    if int(az.__version__.split(".")[0]) > 0:
        from arviz_stats.utils import ELPDData

        kind = {"kind": "loo"} if "kind" in inspect.signature(ELPDData).parameters else {}
        return ELPDData(**common, **kind, elpd=total, p=0.0, good_k=0.7, elpd_i=pointwise)
    from arviz.stats.stats_utils import ELPDData

    values = {"elpd_loo": total, **common, "p_loo": 0.0, "loo_i": pointwise}
    return ELPDData(data=list(values.values()), index=list(values))


Result = Estimate | str | os.PathLike[str]


@explain_call
def compare(results: Mapping[str, Result | Sequence[Result]]) -> Comparison:
    """Compares models by estimates of log p(x) of the same data, relative to the same base measure: paired differences.

    Args:
        results: for each model an `Estimate`, the file or the folder of a saved one, a run folder, or a sequence of
            these, one for each run.

    Raises:
        UsageError: fewer than two models; other data or another binarisation (their digests differ); another base
            measure; or a density on grey levels that were not dequantised, whose likelihood has no ceiling.

    >>> one = torch.ones(50).double()
    >>> def of(log_px):
    ...     return Estimate(log_px, 0.01 * one, 99 * one, 0.1 * one, log_px, 0 * one, 100, 0, 3, "binary", digest="a")
    >>> found = compare({"a": of(-one), "b": of(-2 * one)})
    >>> found.names, found.difference("b", "a")
    (('a', 'b'), (-1.0, 0.0))
    """
    if not isinstance(results, Mapping):
        raise UsageError(
            f"compare: expected a dict, as {{'one': estimates, 'other': estimates}}, found {type(results).__name__}"
        )
    scores = {name: _load_estimates(given) for name, given in results.items()}
    if len(scores) < 2 or not all(scores.values()):
        raise UsageError(f"compare: expected two models or more with an estimate each, found {sorted(scores)}")
    every = [(name, one) for name, own in scores.items() for one in own]
    first_name, first = every[0]
    for name, one in every:
        _check_comparable(first_name, first, name, one)
    means = {name: torch.stack([one.log_px.double().cpu() for one in own]).mean(0) for name, own in scores.items()}
    order = sorted(means, key=lambda name: _sort_key(float(means[name].mean())), reverse=True)
    most = max(len(own) for own in scores.values())
    run_means = torch.full((len(order), most), math.nan, dtype=torch.float64)
    for i, name in enumerate(order):
        for j, one in enumerate(scores[name]):
            run_means[i, j] = one.log_px.mean()
    return Comparison(
        names=tuple(order),
        log_px=torch.stack([means[name] for name in order]),
        runs=torch.tensor([len(scores[name]) for name in order]),
        run_means=run_means,
        unreliable=torch.tensor([_unreliable_share(scores[name]) for name in order]).double(),
        methods=tuple(" and ".join(sorted({_method(one) for one in scores[name]})) for name in order),
        base_measure=first.base_measure,
        data=first.data,
        digest=first.digest,
        warnings=tuple(_warnings(order, scores)),
    )


def _load_estimates(given: Result | Sequence[Result]) -> list[Estimate]:
    several: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    for one in several:
        if not isinstance(one, Estimate | str | os.PathLike):
            raise UsageError(
                f"compare: expected estimates of log_marginal, or paths to saved ones, found {type(one).__name__}. "
                f"Pass log_marginal(model, guide, data) of each"
            )
    return [one if isinstance(one, Estimate) else load_estimate(one) for one in several]


def _sort_key(mean: float) -> float:
    return -math.inf if math.isnan(mean) else mean


def _unreliable_share(own: Sequence[Estimate]) -> float:
    return float(torch.cat([~one.reliable.cpu() for one in own]).double().mean())


def _check_comparable(first_name: str, first: Estimate, name: str, one: Estimate) -> None:
    if one.base_measure == "density on [0, 1]":
        raise UsageError(
            f"{name}: a density on [0, 1] of grey levels that were not dequantised has no ceiling: it grows "
            f"without a bound as a scale shrinks. Train and evaluate with dequantize=True to compare"
        )
    if one.base_measure != first.base_measure:
        raise UsageError(
            f"log p(x) of {first_name} is relative to {first.base_measure!r} and of {name} to {one.base_measure!r}: "
            f"numbers on different base measures are not ranked"
        )
    if one.log_px.shape != first.log_px.shape or one.digest != first.digest:
        raise UsageError(
            f"{first_name} and {name} were evaluated on other data, or on another binarisation of them: "
            f"{len(first.log_px)} with SHA-256 {first.digest[:12] or 'unknown'}, {len(one.log_px)} with "
            f"{one.digest[:12] or 'unknown'}. Evaluate both on the same split"
        )


def _warnings(order: Sequence[str], scores: Mapping[str, list[Estimate]]) -> list[str]:
    out = []
    methods = {_method(one) for own in scores.values() for one in own}
    if len(methods) > 1:
        out.append(f"unequal tightness: log p(x) was estimated by {'; '.join(sorted(methods))}")
        if all(one.guide_estimate or "proposal" not in one.settings for own in scores.values() for one in own):
            out[-1] += " (L_K of the guide is in log_marginal_guide, beside refined estimates)"
    shares = {name: _unreliable_share(scores[name]) for name in order}
    if max(shares.values()) - min(shares.values()) > MAX_UNRELIABLE_DIFFERENCE:
        worst = max(shares, key=lambda name: shares[name])
        out.append(
            f"unequal tightness: {100 * shares[worst]:.1f} % of the data of {worst} are unreliable, and "
            f"{100 * min(shares.values()):.1f} % of the best model in this respect: its log p(x) may be too low by more"
        )
    improper = [
        name for name in order if any(note.startswith(NOT_NORMALIZED) for o in scores[name] for note in o.notes)
    ]
    if improper:
        out.append(f"not comparable: {', '.join(improper)} are no normalised densities: log p(x) includes a constant")
    bounds = [name for name in order if any(one.lower_bound_only for one in scores[name])]
    if bounds and len(bounds) < len(order):
        out.append(f"lower bounds only: {', '.join(bounds)}")
    broken = [name for name in order if not all(bool(one.log_px.isfinite().all()) for one in scores[name])]
    if broken:
        out.append(f"log p(x) is not finite for some data: {', '.join(broken)}")
    if any(one.joint for own in scores.values() for one in own):
        out.append("weights are joint: one log p(x) for the whole data set, so that there are no paired differences")
    if any(one.digest == "" for own in scores.values() for one in own):
        out.append("an estimate has no digest of its data: whether the data are the same could not be checked")
    return out


def looseness(tighter: Estimate, est: Estimate, k: int | None = None) -> Tensor:
    """log p(x) by a tighter estimate minus L_k of importance sampling, per datum, [N] nats.

    Both are lower bounds of log p(x) on average: the mean is a lower bound, up to its standard error, of the bias of
    L_k.

    Args:
        tighter: an estimate by `annealed`.
        est: an estimate of the same data by `log_marginal`.
        k: one of the recorded bounds of `est`; its K by default.

    Raises:
        UsageError: the estimates are of other data or relative to other measures, or L_k was not recorded.

    >>> import torch
    >>> from ppvae.evaluation import annealed, log_marginal
    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.ones(4, 3).double()
    >>> tighter = annealed(pair.model, pair.mean_field, x, num_temperatures=20)
    >>> looseness(tighter, log_marginal(pair.model, pair.mean_field, x, num_particles=50), 1).shape
    torch.Size([4])
    """
    check_ranges(k=k)
    if (tighter.digest, len(tighter.log_px)) != (est.digest, len(est.log_px)):
        raise UsageError(
            f"looseness: expected estimates of the same data, found {len(tighter.log_px)} with SHA-256 "
            f"{tighter.digest[:12] or 'unknown'} and {len(est.log_px)} with {est.digest[:12] or 'unknown'}"
        )
    if tighter.base_measure != est.base_measure:
        raise UsageError(
            f"looseness: log p(x) relative to {tighter.base_measure!r} and to {est.base_measure!r} cannot be compared"
        )
    return tighter.log_px - (est.log_px if k in (None, est.num_particles) else est.bound(int(k or 0)))


def looseness_and_error(tighter: Estimate, est: Estimate, k: int | None = None) -> tuple[float, float]:
    """(mean of `looseness`, its paired standard error over the data), in nats.

    For a single datum, or one estimate for the whole data set, the error is that of the two Monte-Carlo averages.
    """
    difference = looseness(tighter, est, k)
    if len(difference) > 1:
        return mean_and_error(difference)
    return float(difference), math.hypot(float(tighter.std_error), float(est.std_error))


def looseness_notes(tighter: Estimate, est: Estimate, ks: Sequence[int] = ()) -> tuple[str, str]:
    """Two notes: both estimates, with the looseness of importance sampling at its K and at `ks`; what it means."""
    ks = sorted({*ks, est.num_particles})
    means = {k: est.nll if k == est.num_particles else -float(est.bound(k).mean()) for k in ks}
    both = [f"{tighter.nll:.3f} by {tighter.method}", *(f"{means[k]:.3f} by L_{k}" for k in ks)]
    unit = "nats for the whole data set" if tighter.joint else "nats"
    found = [f"{_describe_looseness(*looseness_and_error(tighter, est, k), unit)} at K = {k}" for k in ks]
    return (
        f"NLL of the same {count_of(len(tighter.log_px))}: {', '.join(both)}: importance sampling is "
        f"{', '.join(found)}",
        "both are lower bounds of log p(x) on average, so that the higher one is closer to it, and both miss a mode "
        "that none of their draws reach",
    )


def _describe_looseness(mean: float, error: float, unit: str) -> str:
    if mean > 2 * error:
        return f"{mean:.3f} ± {error:.3f} {unit} loose"
    if mean < -2 * error:
        return f"the tighter one by {-mean:.3f} ± {error:.3f} {unit} (more temperatures or chains would help annealing)"
    return f"not seen to be loose ({mean:.3f} ± {error:.3f} {unit})"
