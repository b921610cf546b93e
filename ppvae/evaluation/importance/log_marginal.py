"""log p(x) by importance sampling, per datum, for any pair."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ppvae.compilation.precision import check_precision
from ppvae.distributed import distributed_context, progress_disabled
from ppvae.errors import UsageError
from ppvae.evaluation.block_cache import SECONDS, BlockCache, cache_key
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, as_columns, data_digest, inspect_columns, program_device
from ppvae.evaluation.estimate import Estimate, base_measure_of, missing_values_note
from ppvae.evaluation.importance.allocation import AdaptiveAllocation
from ppvae.evaluation.importance.sampler import ImportanceSampler
from ppvae.evaluation.reliability import recommend_alternative
from ppvae.inference.evaluation_mode import evaluation_mode, record_modules
from ppvae.inference.param_store import bind_program
from ppvae.inference.tracing import Program
from ppvae.rng import fork_rng


def log_marginal(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int | Literal["auto"] = 1000,
    target_std_error: float = 0.05,
    max_particles: int = 20_000,
    seed: int = 0,
    bounds: Sequence[int] = (),
    posterior_draws: int = 0,
    rows: int | None = None,
    precision: str = "float32",
    compile: bool = True,
    directory: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Estimate:
    """Importance-weighted log p(x) per datum for any model/guide pair, with a diagnosis of its trustworthiness.

    log p(x) is estimated by log (1/K) sum_k p(x, z_k) / q(z_k | x), z_k ~ q(z | x): a lower bound on average
    (Burda et al. 2016, arXiv 1509.00519; Mattei and Frellsen 2019, arXiv 1812.02633, where values are missing). Modules
    are in evaluation mode meanwhile; no parameter is created.

    With num_particles="auto" a pilot decides how many particles each datum gets, 100, 200, 400, ..., so that standard
    error, ess and k_hat are likely to do; the estimate is made of as many fresh draws. To stop by the estimate's own
    weights would bias it: it would stop where the heavy ones have not come up yet, and look good. The pilot doubles,
    100, 200, ..., until it calls for at most 4 times its own particles: it costs a fourth of the estimate or little
    more where that is large. `est.particles` says what each datum got, `est.on_target` which are reliable and within
    the target by their fresh weights; of the others most had all of `max_particles`, and some a pilot that was too
    hopeful. The defaults: a standard error of 0.05 makes log p(x) too low by about 0.05^2 / 2 = 0.001 nats, the last
    digit that is usually told; 20,000 particles are four times the usual 5000, after which another method pays better.

    Inside an initialised `torch.distributed` group the processes share the data: all of them make the same call, and
    each returns the whole estimate, the same as one process would give.

    Args:
        model, guide: a Pyro pair that keeps the contract (see `ppvae.check`), or run.model, run.guide.
        data: a tensor [N, *event], a split, or a tuple of them: the pair is called as model(*batch). In data marked by
            `data.with_missing`, NaN is a missing value, and log p(x) that of the values observed.
        num_particles: K; or "auto": as many as each datum needs, see below.
        target_std_error, max_particles: for "auto", of each datum: the standard error wanted, and the most particles
            that its estimate may take.
        seed: of the guide's draws. The same seed gives the same result however memory is cut.
        bounds: further k at which to record L_k.
        posterior_draws: how many draws of each latent to keep per datum, resampled by weight.
        rows: the most (datum, particle) rows that go through the model at once, 5000 by default; memory grows with it.
        precision: of the products in linear and convolutional layers, as in `fit`: what is estimated with "bf16" is
            log p(x) of the model whose layers multiply in bfloat16. The estimate's notes say how far that is from
            float32 on some of the data; everything outside layers is as ever.
        compile: compile the run of the pair where there is enough left to compute; the same up to rounding.
        directory: where finished blocks of data are kept, so that the same call goes on from them after an
            interruption, and gives the same result (up to rounding where runs of the pair are compiled).
        device: where to compute; the parameters' device by default.
        progress: show a progress bar; by default where the output is a terminal.

    Raises:
        ContractError: the pair breaks the contract, by the site's name; UsageError, DataError: bad arguments, data or
            directory; PpvaeError: another process of the group failed.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.zeros(4, 3).double()
    >>> est = log_marginal(pair.model, pair.guide, x, num_particles=100)
    >>> bool((est.log_px - pair.log_px(x)).abs().max() < 1e-9), bool(est.reliable.all())
    (True, True)
    """
    if num_particles != "auto" and not hasattr(num_particles, "__index__"):
        raise UsageError(f"num_particles: expected a number or 'auto', found {num_particles!r}")
    particles = AdaptiveAllocation(target_std_error, max_particles) if num_particles == "auto" else int(num_particles)
    if isinstance(particles, int) and particles < 1:
        raise UsageError(f"num_particles: expected at least 1, found {num_particles}")
    rows = DATA_BLOCK * PARTICLE_BLOCK if rows is None else rows
    if rows < 1:
        raise UsageError(f"rows: expected at least 1, found {rows}")
    model, guide = bind_program(model), bind_program(guide)
    with distributed_context() as shares:
        columns = as_columns(data, seed)
        with fork_rng(), evaluation_mode(model, guide):
            place = torch.device(device) if device is not None else program_device(model, guide, columns)
            check_precision(precision, place)
            with record_modules(model, guide) as modules:
                s, size = inspect_columns(model, guide, columns, place)
            task = ImportanceSampler(
                model, guide, s, columns, size, place, particles, bounds, posterior_draws, seed, rows, precision
            )
            key: dict[str, Any] = {}
            if directory is not None or shares.size > 1:
                more = {"what": "log_marginal", "device": place.type}
                key = cache_key(columns, s, modules, task.settings() | more)
            mine = shares.mine(task.blocks)
            cells = task.cells(len(mine)) if compile else None
            parts: dict[int, dict[str, Tensor]] = {}
            bar = tqdm(total=len(mine), desc="log p(x)", unit="block", disable=progress_disabled(progress))
            with bar, BlockCache(directory, key, SECONDS) as store:
                for number in mine:
                    parts[number], _ = store.part(f"block-{number:05d}", functools.partial(task, number, cells))
                    bar.update()
                    if not bar.disable:
                        bar.set_postfix(nll=f"{-torch.cat([p['log_px'] for p in parts.values()]).mean():.3f}")
            rounding = task.rounding_note()
        results = shares.gathered(parts, key)
    missing = int(sum(r.pop("missing") for r in results))
    names = [n for n in results[0] if all(n in r for r in results)]  # L_k for those k that every datum has
    joined = {n: torch.cat([r[n] for r in results], dim=int(n.startswith("posterior/"))) for n in names}
    posterior = {n.partition("/")[2]: joined.pop(n) for n in list(joined) if n.startswith("posterior/")}
    base, levels, notes = base_measure_of(columns[0], s)
    notes += s.remarks + rounding
    dims: float = s.observed_dims
    if missing:
        dims -= missing / len(columns[0])
        notes += (missing_values_note(dims, s),)
    if posterior_draws and not posterior:
        notes += ("no posterior draws: latents shared by all data, or beside enumerated sites, are not kept",)
    diagnostics: dict[str, Tensor] = {n: joined.pop(n) for n in ("num_particles", "pilot_particles") if n in joined}
    per_datum: dict[str, Any] = {k: v for k, v in joined.items() if not k.startswith("bound_")}
    return Estimate(
        **per_datum,
        num_particles=particles if isinstance(particles, int) else int(diagnostics["num_particles"].max()),
        seed=seed,
        dims=dims * (len(columns[0]) if s.has_global_latents else 1),
        base_measure=base,
        levels=levels,
        lower_bound_only=s.lower_bound_only,
        joint=s.has_global_latents,
        data=getattr(columns[0], "description", ""),
        digest=data_digest(columns),
        bounds={int(k.removeprefix("bound_")): v for k, v in joined.items() if k.startswith("bound_")},
        posterior=posterior or None,
        notes=notes,
        settings=({} if isinstance(particles, int) else {"particles": "by need"}) | task.chosen(),
        diagnostics=diagnostics,
        remedy=recommend_alternative(s),
    )
