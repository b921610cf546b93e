"""One GPU in ten minutes: what has to be right on it, the benchmark's rows, and a row of a table.

First correctness: log p(x) of the linear-Gaussian pair beside its exact value, steps of a compiled graph beside eager
ones, layers in bf16 and tf32 beside float32, a run that is interrupted and resumed beside one that is not. Then steps
and log p(x) of ppvae beside hand-written ones, eager and replayed as a CUDA graph, and NumPyro's where jax has the GPU,
with the peak memory. What is left of `--minutes` trains IWAE-50 by the schedule of Burda et al. 2016 (arXiv 1509.00519)
in runs/gpu/iwae-50, which the next call resumes. Results are written to runs/gpu.json.

    python -m experiments.gpu --minutes 10

`--device cpu --smoke` tests the code; without a GPU there is nothing else to run."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from experiments import iwae, table1
from experiments.bench import SMOKE, Settings, hand_written, other_libraries
from experiments.bench.pairs import build, data
from experiments.cells import markdown
from ppvae import data as datasets
from ppvae import fit, log_marginal, objectives
from ppvae.inference.svi import SVI
from ppvae.models import LinearGaussian

ROUNDS, BATCHES = 5, (100, 1000)
ADAM = functools.partial(torch.optim.Adam, lr=1e-3)
Rows = list[list[str]]


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """The median over rounds of the time of a step, after a round that is not counted."""
    times = []
    for _ in range(ROUNDS + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        times.append((time.perf_counter() - start) / steps * 1e3)
    return statistics.median(times[1:])


# ------------------------------------------------------------------------------------------------------ correctness


def exact(device: torch.device) -> str:
    """log p(x) of a linear-Gaussian pair by its exact posterior and by a refined proposal."""
    torch.manual_seed(0)
    pair = LinearGaussian(20, 5).to(device)
    x = torch.randn(200, 20, device=device)
    truth = pair.log_px(x)
    found = log_marginal(pair.model, pair.guide, x, num_particles=500, progress=False, proposal="guide")
    refined = log_marginal(pair.model, pair.mean_field, x, num_particles=2000, proposal="refined", progress=False)
    errors = [float((e.log_px - truth.detach().cpu()).abs().max()) for e in (found, refined)]
    right = errors[0] < 1e-3 and errors[1] < 0.2 and bool(refined.reliable.all())
    return f"{verdict(right)}: largest error {errors[0]:.1e} with the exact guide, {errors[1]:.1e} refined"


def compiled_steps(device: torch.device, s: Settings) -> str:
    """Losses of twenty steps by a graph and by the pair."""
    found = []
    for kernels in ("eager", "compiled"):
        svi, batch = stepper(device, s, 1, kernels, "float32")
        torch.manual_seed(1)
        with pyro.validation_enabled(False):
            found.append(torch.tensor([svi.step(batch) for _ in range(20)]))
    off = float(((found[0] - found[1]) / found[0]).abs().max())
    return f"{verdict(off < 1e-3)}: twenty compiled losses within {off:.1e} of the eager ones"


def precisions(device: torch.device, s: Settings) -> str:
    """The difference of the first loss in bf16, and in tf32 on a GPU, from float32."""
    losses = {}
    for precision in ("float32", "bf16", *(["tf32"] if device.type == "cuda" else [])):
        svi, batch = stepper(device, s, 5, "eager", precision)
        torch.manual_seed(1)
        losses[precision] = svi.evaluate_loss(batch) if precision == "float32" else svi.step(batch)
    torch.manual_seed(1)
    off = {p: abs(loss / losses["float32"] - 1) for p, loss in losses.items() if p != "float32"}
    words = ", ".join(f"{p} {value:.1e}" for p, value in off.items())
    return f"{verdict(max(off.values()) < 1e-2)}: relative difference of a loss from float32: {words}"


def resumed(device: torch.device) -> str:
    """Parameters of four epochs, and of two and two."""
    x = datasets.load("digits")[0].read()[:500].to(device)
    states = []
    for parts in ((4,), (2, 4)):
        with tempfile.TemporaryDirectory() as folder:
            for epochs in parts:
                torch.manual_seed(0)
                pyro.clear_param_store()
                pair = LinearGaussian(x.flatten(1).shape[1], 5).to(device)
                fit(pair.model, pair.guide, x.flatten(1), epochs=epochs, directory=folder, resume=True, progress=False)
            states.append([p.detach().clone() for p in pair.parameters()])
    same = all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    return f"{verdict(same)}: a resumed run ends with the same bits"


def verdict(right: bool) -> str:
    return "right" if right else "WRONG"


# ------------------------------------------------------------------------------------------------------------ speed


def stepper(device: torch.device, s: Settings, particles: int, kernels: str, precision: str) -> tuple[SVI, Tensor]:
    """An SVI of the one-layer pair, and a batch."""
    pair, batch = build("one layer", s), data("one layer", s.batch).to(device)
    pair.to(device)  # type: ignore[union-attr]
    loss = objectives.IWAE(particles) if particles > 1 else objectives.ELBO()
    svi = SVI(pair.model, pair.guide, ADAM, loss)
    svi.precision = precision
    svi.use(kernels, settled=True)
    return svi, batch


def hand_written_step(device: torch.device, s: Settings, particles: int, graph: bool) -> Callable[[], object]:
    """A step of plain torch with the fused Adam; with `graph` it is replayed as a CUDA graph."""
    pair, batch = build("one layer", s), data("one layer", s.batch).to(device)
    pair.to(device)  # type: ignore[union-attr]
    loss, parameters = hand_written.loss_and_parameters(pair, particles)
    adam = torch.optim.Adam(parameters, lr=1e-3, fused=True, capturable=graph)

    def step() -> Tensor:
        adam.zero_grad(set_to_none=True)
        value = loss(batch)
        value.backward()
        adam.step()
        return value

    if not graph:
        return lambda: step().item()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def ppvae_step(device: torch.device, s: Settings, particles: int, kernels: str, precision: str) -> Callable[[], object]:
    svi, batch = stepper(device, s, particles, kernels, precision)

    def step() -> None:
        with pyro.validation_enabled(False):
            svi.unread_gradients(batch)
            svi.update()

    return step


def numpyro_step(s: Settings, particles: int) -> float:
    """Milliseconds of a step of NumPyro's scan."""
    run = other_libraries.numpyro_step("one layer", s, particles, scanned=True)
    return statistics.median(run() for _ in range(ROUNDS)) * 1e3


def numpyro_has_gpu() -> bool:
    if not other_libraries.installed("numpyro"):
        return False
    import jax

    return any(d.platform == "gpu" for d in jax.devices())


def step_rows(device: torch.device, s: Settings) -> Rows:
    """[row, contender, milliseconds, of hand-written, peak memory] of training steps."""
    rows: Rows = []
    kinds = [("VAE", 1, BATCHES[0]), *((f"IWAE-{s.iwae}", s.iwae, batch) for batch in BATCHES)]
    for what, particles, batch in kinds:
        sized = dataclasses.replace(s, batch=min(batch, 10 * s.batch))
        row = f"{what} step, batch {sized.batch}"
        contenders: dict[str, Callable[[], Callable[[], object]]] = {
            "hand-written": functools.partial(hand_written_step, device, sized, particles, False)
        }
        if device.type == "cuda":
            contenders["hand-written, CUDA graph"] = functools.partial(
                hand_written_step, device, sized, particles, True
            )
        for kernels, precision in (("eager", "float32"), ("compiled", "float32"), ("compiled", "bf16")):
            contenders[f"ppvae {kernels}, {precision}"] = functools.partial(
                ppvae_step, device, sized, particles, kernels, precision
            )
        base = None
        for who, make in contenders.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken = milliseconds(make(), sized.steps_of(particles), device)
            base = base or taken
            rows.append([row, who, f"{taken:.2f}", f"{taken / base:.2f}", peak(device)])
        if numpyro_has_gpu():
            taken = numpyro_step(sized, particles)
            rows.append(
                [f"{what} step, batch {sized.batch}", "NumPyro scanned", f"{taken:.2f}", f"{taken / base:.2f}", ""]
            )
    return rows


def log_px_rows(device: torch.device, s: Settings) -> Rows:
    """[row, contender, milliseconds per datum, "", peak memory] of log p(x)."""
    pair, x = build("one layer", s), data("one layer", 4 * s.num_eval).to(device)
    pair.to(device)  # type: ignore[union-attr]
    rows: Rows = []
    for name, options in {
        "guide": {"proposal": "guide"},
        "guide, bf16": {"proposal": "guide", "precision": "bf16"},
        "refined": {"proposal": "refined"},
    }.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        log_marginal(pair.model, pair.guide, x, num_particles=s.particles, progress=False, **options)
        taken = (time.perf_counter() - start) / len(x) * 1e3
        rows.append([f"log p(x), K = {s.particles}", f"ppvae, {name}", f"{taken:.2f}", "", peak(device)])
    return rows


def peak(device: torch.device) -> str:
    return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB" if device.type == "cuda" else ""


# ------------------------------------------------------------------------------------------------------------ table


def train_iwae_50(device: torch.device, seconds: float, folder: Path, smoke: bool) -> str:
    """IWAE-50 by the paper's schedule until the time is over, and how far it is."""
    name = "digits" if smoke else "mnist"
    train = datasets.load(name, binarize="dynamic")[0]
    settings = table1.Settings(paper=True, hidden=(8, 8) if smoke else (200, 200))
    torch.manual_seed(0)
    pair = table1.build_pair(settings, 1, train.read().mean(0)).to(device)
    end = time.monotonic() + seconds
    run = fit(
        pair.model, pair.guide, train, epochs=2 if smoke else len(iwae.PAPER), batch_size=200 if smoke else 20,
        objective=iwae.OBJECTIVES["IWAE"](50), optimizer=functools.partial(torch.optim.Adam, eps=1e-4),
        scheduler=iwae.stepwise_decay(iwae.PAPER), directory=folder, resume=True, device=device,
        callbacks=[lambda *_: time.monotonic() > end], checkpoint_seconds=30,
    )  # fmt: skip
    return f"{run.metrics['epoch']} of {len(iwae.PAPER)} epochs, training loss {run.metrics['loss']:.2f}"


def main(args: list[str] | None = None) -> None:
    """Prints the checks and the table, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the whole run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="small networks and two epochs, as a test of the code")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.json"))
    given = parser.parse_args(args)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(
            1, "experiments.gpu: expected a GPU that torch can use, found none; --device cpu --smoke tests the code\n"
        )
    start, device = time.monotonic(), torch.device(given.device)
    s = SMOKE if given.smoke else Settings()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    checks = {}
    for what, check in {
        "exact log p(x)": functools.partial(exact, device),
        "compiled steps": functools.partial(compiled_steps, device, s),
        "precisions": functools.partial(precisions, device, s),
        "resumed run": functools.partial(resumed, device),
    }.items():
        checks[what] = check()
        print(f"{what}: {checks[what]}", flush=True)
    rows = step_rows(device, s) + log_px_rows(device, s)
    header = ("row", "contender", "ms", "of hand-written", "peak memory")
    print(markdown(header, rows), flush=True)
    left = max(0.0, 60 * given.minutes - (time.monotonic() - start))
    checks["IWAE-50, paper's schedule"] = train_iwae_50(
        device, left, given.output.parent / "gpu" / "iwae-50", given.smoke
    )
    print(checks["IWAE-50, paper's schedule"])
    given.output.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"device": name, "torch": torch.__version__, "checks": checks}
    given.output.write_text(json.dumps(content | {"header": header, "rows": rows}, indent=1) + "\n")
    print(f"results: {given.output}")


if __name__ == "__main__":
    main()
