"""Trains, and is killed: a process that has torch loaded forks a child for every run that test_resume.py orders.

An order is a line of JSON on standard input, its answer a line of JSON on standard output. The child trains a small VAE
on digits with batch norm, dropout, Adam, a schedule, binarisation at every read and validation data, saves every
epoch, and writes what came out to the file `result`.
"""

import contextlib
import functools
import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppvae import VAE, data, fit, likelihoods, posteriors, priors, storage
from ppvae import nn as networks
from ppvae.training import checkpoint

EPOCHS = 10


def small_vae() -> VAE:
    body = nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.Dropout(0.2), nn.ReLU(), nn.Linear(24, 6))
    return VAE(
        prior=priors.StandardNormal(3),
        likelihood=likelihoods.Bernoulli(networks.mlp(3, 64, hidden=(24,))),
        posterior=posteriors.DiagonalNormal(body),
    )


def without_seconds(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if k != "seconds"}


def train(order: dict[str, Any], splits: tuple[Any, ...]) -> dict[str, Any]:
    """One run as ordered; returns digests of every parameter and buffer, and the metrics."""
    for _ in range(order.get("before", 0)):
        small_vae()
    torch.manual_seed(0)
    vae = small_vae()
    torch.manual_seed(order.get("noise", 1))  # the state of the process when fit begins must not count
    folder = Path(order["folder"])
    prepare(order)
    callbacks = []
    if order.get("nobody") and os.geteuid() == 0:
        os.seteuid(65534)  # the superuser may write anywhere
    if "limit" in order:
        callbacks.append(lambda run, m: m["epoch"] == 2 and full_disk(order["limit"]))
    run = fit(
        vae.model,
        vae.guide,
        splits[0].head(240),
        valid=splits[1].head(60),
        optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS),
        epochs=EPOCHS,
        batch_size=40,
        directory=folder,
        resume=order.get("resume", False),
        checkpoint_seconds=0,
        callbacks=callbacks,
        clip=order.get("clip"),
        compile=order.get("compile"),
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {
        "tensors": {k: hashlib.sha256(t.numpy().tobytes()).hexdigest() for k, t in vae.state_dict().items()},
        "history": [without_seconds(m) for m in run.history],
        "lines": [without_seconds(json.loads(line)) for line in lines],
    }


def full_disk(limit: int) -> None:
    """From now on no file can grow beyond so many bytes: a real error of the real `write`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def prepare(order: dict[str, Any]) -> None:
    """Arranges that the process is killed at a given moment of its n-th save: {"save": n, "stage": stage}."""
    if "die" not in order:
        return
    wanted, stage = order["die"]["save"], order["die"]["stage"]
    real_save, calls, active = checkpoint.save, {"save": 0}, [False]

    def save(*args: Any) -> Path:
        calls["save"] += 1
        active[0] = calls["save"] == wanted
        return real_save(*args)

    def dying(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if active[0]:
                calls[name] = calls.get(name, 0) + 1
                if f"{name} {calls[name]}" == stage:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    def half_open(path: Any, *args: Any) -> Any:
        file = open(path, *args)  # noqa: SIM115
        if active[0]:
            real_write = file.write

            class Half:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: Any) -> None:
                    file.close()

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                def write(self, content: bytes) -> None:
                    calls["write"] = calls.get("write", 0) + 1
                    if f"write {calls['write']}" == stage:
                        real_write(content[: len(content) // 2])
                        file.flush()
                        os.kill(os.getpid(), signal.SIGKILL)
                    real_write(content)

            return Half()
        return file

    checkpoint.save = save
    storage.open = half_open  # type: ignore[attr-defined]
    os.fsync, os.replace = dying("fsync", os.fsync), dying("replace", os.replace)
    Path.unlink = dying("unlink", Path.unlink)  # type: ignore[method-assign]


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def obey(order: dict[str, Any], splits: tuple[Any, ...]) -> dict[str, Any]:
    """Forks a child that trains; kills it if the order says so; says how it ended."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(2, 1)
            Path(order["result"]).write_text(json.dumps(train(order, splits)))
            status = 0
        except BaseException as error:
            os.seteuid(os.getuid())
            Path(order["result"]).write_text(json.dumps({"error": type(error).__name__, "text": str(error)}))
        finally:
            os._exit(status)
    kill = order.get("kill")
    if kill:  # once so many epochs are noted, and a little later
        metrics = Path(order["folder"]) / "metrics.jsonl"
        while lines_in(metrics) < kill["epoch"]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return {"killed": False, "status": os.waitstatus_to_exitcode(status)}
            time.sleep(0.001)
        time.sleep(kill["after"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"killed": code == -signal.SIGKILL, "status": code}


def main() -> None:
    torch.set_num_threads(1)
    splits = data.load("digits", binarize="dynamic")
    if len(sys.argv) > 1:  # a single run in this very process
        order = json.loads(sys.argv[1])
        Path(order["result"]).write_text(json.dumps(train(order, splits)))
        return
    warm = small_vae()  # whatever is imported late is imported once, before the forks
    fit(warm.model, warm.guide, splits[0].head(50), epochs=1)
    with contextlib.suppress(ImportError):  # an extra
        import torch.utils.tensorboard as _  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line), splits)), flush=True)


if __name__ == "__main__":
    main()
