"""Kill it, fill the disk, pull the plug while it saves: the resumed run ends with the same bits."""

import builtins
import errno
import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyro
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.optim import lr_scheduler

from ppvae import data, fit, load, storage
from ppvae.errors import CheckpointError
from ppvae.factories.pairs import resolve
from ppvae.models import LinearGaussian
from ppvae.training import checkpoint
from tests.training import resume_worker

PAIRS = Path(__file__).parents[1] / "programs" / "factory_files"
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
EPOCHS = resume_worker.EPOCHS
_numbers = itertools.count()


@pytest.fixture(scope="module")
def order():
    """Orders a run of the worker, and gives how it ended and what it wrote."""
    worker = subprocess.Popen(
        [sys.executable, resume_worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdin
    assert worker.stdout

    def send(folder: Path, **what):
        result = folder.parent / f"result-{next(_numbers)}.json"
        worker.stdin.write(json.dumps({"folder": str(folder), "result": str(result), **what}) + "\n")
        worker.stdin.flush()
        ended = json.loads(worker.stdout.readline())
        return ended, json.loads(result.read_text()) if result.exists() else None

    yield send
    worker.stdin.close()
    worker.wait()


@pytest.fixture(scope="module")
def whole(order, tmp_path_factory):
    """The run that nothing interrupted: (its folder, what came out)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended, result = order(folder)
    assert ended == {"killed": False, "status": 0}, result
    assert len(result["history"]) == EPOCHS
    assert result["history"] == result["lines"]
    return folder, result


def equal(a, b) -> bool:
    """Whether two states are the same to the last bit, but for seconds and the run's identity."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k not in ("seconds", "run_id"))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def check_same(folder: Path, result, whole) -> None:
    """Parameters, buffers, metrics, and all of the last checkpoint: optimiser, schedule, best parameters."""
    assert result == whole[1]
    assert equal(checkpoint.read(folder / "checkpoints"), checkpoint.read(whole[0] / "checkpoints"))
    assert len(list((folder / "checkpoints").iterdir())) == 2


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


# Kills


def test_the_uninterrupted_run_is_repeatable(order, whole, tmp_path):
    ended, result = order(tmp_path / "run", noise=77, before=2)
    assert ended["status"] == 0
    check_same(tmp_path / "run", result, whole)


@pytest.mark.parametrize("trial", range(12))
def test_killed_at_a_random_moment(order, whole, tmp_path, trial):
    """SIGKILL once or twice, anywhere in an epoch or a save; then on to the end in another process."""
    chance = random.Random(trial)
    kills = 0
    folder = tmp_path / "run"
    for attempt in range(20):  # a run that ended before its kill does not count
        folder = tmp_path / f"run-{attempt}"
        epochs = sorted(chance.sample(range(EPOCHS - 2), 1 + trial % 2))
        kills = 0
        for epoch in epochs:
            kill = {"epoch": epoch, "after": chance.uniform(0, 0.04)}
            ended, _ = order(folder, resume=kills > 0, kill=kill, noise=chance.getrandbits(30))
            kills += ended["killed"]
        if kills == len(epochs):
            break
    assert kills == len(epochs)
    ended, result = order(folder, resume=True, noise=chance.getrandbits(30), before=trial)
    assert ended == {"killed": False, "status": 0}, result
    check_same(folder, result, whole)


@pytest.mark.slow
def test_a_compiled_run_that_is_killed_ends_with_the_same_bits(order, tmp_path):
    """SIGKILL in the middle of an epoch of steps between which nothing but tensors is looked at."""
    ends = {}
    for name, kill in (("whole", {}), ("killed", {"kill": {"epoch": 4, "after": 0.002}})):
        settings = {"compile": True, "clip": 0.5}
        ended, result = order(tmp_path / name, **settings, **kill)
        if kill:
            assert ended["killed"]
            ended, result = order(tmp_path / name, resume=True, noise=9, **settings)
        assert ended == {"killed": False, "status": 0}, result
        ends[name] = result, checkpoint.read(tmp_path / name / "checkpoints")
    assert ends["whole"][1]["kernels"] == "compiled"
    assert equal(ends["whole"], ends["killed"])


def test_resumed_in_a_process_that_knows_nothing(order, whole, tmp_path):
    """Not a fork: a fresh interpreter."""
    folder, result = tmp_path / "run", tmp_path / "result.json"
    ended, _ = order(folder, kill={"epoch": 4, "after": 0.0})
    assert ended["killed"]
    text = json.dumps({"folder": str(folder), "result": str(result), "resume": True})
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, resume_worker.__file__, text], check=True, env=env)
    check_same(folder, json.loads(result.read_text()), whole)


STAGES = {  # what a save does, in order, and which of the two checkpoints a kill before it leaves
    "write 1": 3,  # half of the checkpoint is written
    "fsync 1": 3,
    "replace 1": 3,
    "fsync 2": 3,  # the checkpoint is in place under its digest
    "write 2": 3,  # half of the pointer is written
    "fsync 3": 3,
    "replace 2": 3,
    "fsync 4": 4,  # the pointer is in place
    "unlink 1": 4,
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_saving(order, whole, tmp_path, stage):
    folder = tmp_path / "run"
    ended, _ = order(folder, die={"save": 4, "stage": stage})
    assert ended["killed"]
    saved = checkpoint.read(folder / "checkpoints")
    assert saved["epoch"] == STAGES[stage]
    assert len(saved["history"]) == STAGES[stage]
    vae = resume_worker.small_vae()
    assert len(load(folder, vae.model, vae.guide).history) == STAGES[stage]
    ended, result = order(folder, resume=True)
    assert ended["status"] == 0, result
    check_same(folder, result, whole)


def test_killed_during_the_first_save(order, whole, tmp_path):
    """Nothing is there to load, which is said; the resumed run begins anew."""
    folder = tmp_path / "run"
    ended, _ = order(folder, die={"save": 1, "stage": "replace 2"})
    assert ended["killed"]
    assert not checkpoint.exists(folder / "checkpoints")
    vae = resume_worker.small_vae()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load(folder, vae.model, vae.guide)
    ended, result = order(folder, resume=True)
    assert ended["status"] == 0, result
    check_same(folder, result, whole)


# Disks


def test_a_disk_that_is_full(order, whole, tmp_path):
    """The operating system refuses to write more: a clear error, and the last good checkpoint is kept."""
    folder = tmp_path / "run"
    ended, result = order(folder, limit=8000)
    assert ended == {"killed": False, "status": 1}
    assert result["error"] == "CheckpointError"
    assert "could not be written" in result["text"]
    assert str(folder) in result["text"]
    assert result["text"].count("\n") < 3
    assert checkpoint.read(folder / "checkpoints")["epoch"] == 1
    ended, result = order(folder, resume=True)
    assert ended["status"] == 0, result
    check_same(folder, result, whole)


def test_a_folder_that_is_read_only(order, whole):
    """The worker's child gives up the superuser's rights, if it has them: a clear error, and nothing is changed."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        Path(place).chmod(0o755)
        folder = Path(place) / "run"
        ended, _ = order(folder, die={"save": 4, "stage": "unlink 1"})
        assert ended["killed"]
        before = snapshot(folder)
        folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
        for path in folders:
            path.chmod(0o555)
        try:
            ended, result = order(folder, resume=True, nobody=True)
        finally:
            for path in folders:
                path.chmod(0o755)
        assert ended == {"killed": False, "status": 1}
        assert result["error"] == "CheckpointError"
        assert "Permission denied" in result["text"]
        assert str(folder) in result["text"]
        assert snapshot(folder) == before
        ended, result = order(folder, resume=True)
        assert ended["status"] == 0, result
        check_same(folder, result, whole)


def linear(seed: int = 0) -> LinearGaussian:
    torch.manual_seed(seed)
    return LinearGaussian(4, 2)


def small_data() -> torch.Tensor:
    return torch.randn(60, 4, generator=torch.Generator().manual_seed(1))


def train(pair, folder, epochs=2, **options):
    options = {"batch_size": 20, "optimizer": ADAM, "checkpoint_seconds": 0, "directory": folder} | options
    guide = getattr(pair, "mean_field", pair.guide)
    return fit(pair.model, guide, small_data(), epochs=epochs, **options)


def weights(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("call", ["fsync", "replace", "write", "open"])
def test_errors_of_the_disk_are_named(tmp_path, monkeypatch, call):
    train(linear(), tmp_path)
    good = checkpoint.read(tmp_path / "checkpoints")
    real_open = builtins.open

    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(path, mode="r", *args, **kwargs):
        if "w" not in mode:
            return real_open(path, mode, *args, **kwargs)
        if call == "open":
            no_space()
        file = real_open(path, mode, *args, **kwargs)
        return type("Full", (), {
            "__enter__": lambda self: self, "__exit__": lambda self, *_: file.close(), "write": no_space,
        })()  # fmt: skip

    if call in ("write", "open"):
        monkeypatch.setattr(storage, "open", full, raising=False)
    else:
        monkeypatch.setattr(os, call, no_space)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        train(linear(), tmp_path, epochs=4, resume=True)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path / "checkpoints", {"epoch": 99})
    monkeypatch.undo()
    assert equal(checkpoint.read(tmp_path / "checkpoints"), good)
    pair = linear()
    train(pair, tmp_path, epochs=4, resume=True)
    reference = linear()
    train(reference, None, epochs=4)
    assert same(weights(pair), weights(reference))
    assert not list(tmp_path.rglob("*.tmp"))


def test_metrics_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        train(linear(), tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file"):
        train(linear(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="file"):
        train(linear(), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "x"


def test_leftovers_of_a_kill_are_cleared_away(tmp_path):
    train(linear(), tmp_path)
    for name in ("0" * 64 + ".pt", "last.tmp", "1" * 64 + ".pt.tmp"):
        (tmp_path / "checkpoints" / name).write_bytes(b"half")
    pair = linear()
    assert len(load(tmp_path, pair.model, pair.mean_field).history) == 2
    train(linear(), tmp_path, epochs=3, resume=True)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


# Going on


def test_a_finished_run_is_left_alone(order, whole, tmp_path):
    before = snapshot(whole[0])
    ended, result = order(whole[0], resume=True, before=3, noise=5)
    assert ended["status"] == 0, result
    assert result == whole[1]
    assert snapshot(whole[0]) == before


def test_fewer_epochs_than_there_are_change_nothing(tmp_path):
    first = linear()
    train(first, tmp_path, epochs=3)
    before = snapshot(tmp_path)
    again = linear(seed=9)
    run = train(again, tmp_path, epochs=1, resume=True)
    assert len(run.history) == 3
    assert same(weights(first), weights(again))
    assert snapshot(tmp_path) == before


def test_an_early_stop_is_an_end(tmp_path):
    """The best parameters come back, and nothing is trained."""
    x = data.load("digits", binarize="fixed")

    def stopping(folder, seed=0, **options):
        torch.manual_seed(seed)
        vae = resume_worker.small_vae()
        vae.eval()  # no dropout: it overfits sooner
        run = fit(vae.model, vae.guide, x[0].head(40), valid=x[1], epochs=150, patience=3, batch_size=20,
                  directory=folder, optimizer=functools.partial(torch.optim.Adam, lr=5e-2), **options)  # fmt: skip
        return vae, run

    vae, run = stopping(tmp_path)
    assert len(run.history) < 150
    before = snapshot(tmp_path)
    again, run2 = stopping(tmp_path, seed=4, resume=True)
    assert same(weights(vae), weights(again))
    assert run2.history == run.history
    assert snapshot(tmp_path) == before


def test_more_epochs_than_before(tmp_path):
    straight = linear()
    train(straight, None, epochs=5)
    for epochs in (2, 3, 5):
        pair = linear(seed=epochs)  # its own weights do not count but at the start
        if epochs == 2:
            pair = linear()
        run = train(pair, tmp_path, epochs=epochs, resume=True)
        assert [m["epoch"] for m in run.history] == list(range(1, epochs + 1))
    assert same(weights(pair), weights(straight))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("patience", [None, 2])
def test_parameters_alone_are_loaded_and_not_trained_further(tmp_path, patience):
    """A run without its optimizer is returned and evaluated as the whole one; more epochs are refused in words."""
    adam = functools.partial(torch.optim.Adam, lr=0.5)  # so large that the last parameters are not the best
    options = {"epochs": 6, "valid": small_data(), "patience": patience, "optimizer": adam, "batch_size": 20}
    pair, x = linear(), small_data()
    run = fit(pair.model, pair.mean_field, x, directory=tmp_path / "whole", **options)
    state = checkpoint.read(tmp_path / "whole" / "checkpoints")
    alone = checkpoint.parameters_alone(state)
    assert alone["optimizer"] == {}
    assert alone["scheduler"] is None
    assert (alone["best"] is None) == (patience is None)
    assert max(run.history, key=lambda m: m["valid_elbo"]) != run.metrics
    shutil.copytree(tmp_path / "whole", tmp_path / "alone", ignore=shutil.ignore_patterns("checkpoints"))
    checkpoint.save(tmp_path / "alone" / "checkpoints", alone)
    before = snapshot(tmp_path / "alone")

    loaded, again = linear(seed=7), linear(seed=8)
    assert load(tmp_path / "alone", loaded.model, loaded.mean_field).history == run.history
    resumed = fit(again.model, again.mean_field, x, directory=tmp_path / "alone", resume=True, **options)
    assert resumed.history == run.history
    assert same(weights(loaded), weights(pair))
    assert same(weights(again), weights(pair))
    if patience is None:
        with pytest.raises(CheckpointError, match="to epoch 9: the checkpoint of epoch 6 holds parameters alone, with"):
            fit(again.model, again.mean_field, x, directory=tmp_path / "alone", resume=True, **options | {"epochs": 9})
    assert snapshot(tmp_path / "alone") == before
    assert checkpoint.parameters_alone(alone).keys() == state.keys()


def test_parameters_of_an_unfinished_run_are_not_kept_alone(tmp_path):
    train(linear(), tmp_path)
    state = checkpoint.read(tmp_path / "checkpoints") | {"finished": False}
    with pytest.raises(CheckpointError, match="expected a finished one"):
        checkpoint.parameters_alone(state)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 30}, "batch_size"),
        ({"optimizer": functools.partial(torch.optim.Adam, lr=1e-3)}, "optimizer"),
        ({"optimizer": functools.partial(torch.optim.SGD, lr=1e-2)}, "optimizer"),
        ({"scheduler": functools.partial(lr_scheduler.StepLR, step_size=1)}, "scheduler"),
        ({"clip": 1.0}, "clip"),
        ({"valid": small_data(), "patience": 3}, "patience"),
    ],
)
def test_other_settings_are_refused(tmp_path, options, name):
    train(linear(), tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=name):
        train(linear(), tmp_path, epochs=4, resume=True, **options)
    assert snapshot(tmp_path) == before


def test_other_data_are_refused(tmp_path):
    train(linear(), tmp_path)
    pair, x = linear(), small_data()
    x[3, 1] += 1e-6
    options = {"epochs": 4, "batch_size": 20, "optimizer": ADAM, "directory": tmp_path, "resume": True}
    with pytest.raises(CheckpointError, match="digest"):
        fit(pair.model, pair.mean_field, x, **options)
    with pytest.raises(CheckpointError, match="num_data"):
        fit(pair.model, pair.mean_field, x[:50], **options)


def test_another_pair_is_refused_and_left_as_it_is(tmp_path):
    train(linear(), tmp_path)
    torch.manual_seed(0)
    other = LinearGaussian(4, 3)
    before = weights(other)
    with pytest.raises(CheckpointError, match="fit the checkpoint"):
        train(other, tmp_path, epochs=4, resume=True)
    assert same(weights(other), before)


def test_a_run_is_not_overwritten(tmp_path):
    train(linear(), tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="resume=True"):
        train(linear(), tmp_path)
    assert snapshot(tmp_path) == before


def test_a_resumed_run_that_is_not_there_is_a_new_one_with_a_line_that_says_so(tmp_path, caplog):
    there, new = tmp_path / "run", tmp_path / "other"
    train(linear(), there)
    train(linear(), there, epochs=4, resume=True)
    train(linear(), tmp_path / "plain")
    assert not caplog.messages
    run = train(linear(), new, resume=True)
    assert caplog.messages == [f"ppvae: no checkpoint in {new}: a new run is started"]
    assert run.history[0]["epoch"] == 1


def test_a_row_of_data_of_other_shapes_is_refused(tmp_path):
    train(linear(), tmp_path)
    state = checkpoint.read(tmp_path / "checkpoints")
    checkpoint.save(tmp_path / "checkpoints", state | {"row": [torch.zeros(1, 7)]})
    with pytest.raises(CheckpointError, match=r"row of data: expected shapes .* found \[\[\[1, 7\]"):
        load(tmp_path, linear().model, linear().mean_field)
    checkpoint.save(tmp_path / "checkpoints", state | {"row": "none"})
    with pytest.raises(CheckpointError, match="'row' of data"):
        load(tmp_path, linear().model, linear().mean_field)


def test_a_checkpoint_without_a_row_of_data_is_loaded(tmp_path):
    train(linear(), tmp_path)
    state = checkpoint.read(tmp_path / "checkpoints")
    del state["row"]  # as earlier versions wrote it
    checkpoint.save(tmp_path / "checkpoints", state)
    pair = linear()
    assert load(tmp_path, pair.model, pair.mean_field).history == state["history"]


def test_another_number_of_particles_is_refused(tmp_path):
    train(linear(), tmp_path)
    with pytest.raises(CheckpointError, match="objective"):
        train(linear(), tmp_path, epochs=4, resume=True, objective=Trace_ELBO(num_particles=5))


def test_other_validation_data_are_refused(tmp_path):
    train(linear(), tmp_path, valid=small_data())
    with pytest.raises(CheckpointError, match="valid"):
        train(linear(), tmp_path, epochs=4, resume=True, valid=2 * small_data())


SCHEDULES = {
    "step": functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.5),
    "milestones": functools.partial(lr_scheduler.MultiStepLR, milestones=[1, 3]),
    "one cycle": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9),
    "plateau": functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0),
    "chained": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.5, 1), lr_scheduler.ExponentialLR(optimizer, 0.9)], [2]
    ),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    "multiplied": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_go_on(tmp_path, schedule):
    straight, pair = linear(), linear()
    want = [m["lr"] for m in train(straight, None, epochs=4, scheduler=schedule).history]
    assert len(set(want)) > 1
    train(pair, tmp_path, epochs=2, scheduler=schedule)
    pair = linear(seed=3)
    found = [m["lr"] for m in train(pair, tmp_path, epochs=4, scheduler=schedule, resume=True).history]
    assert found == want
    assert same(weights(pair), weights(straight))


PYRO_OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 1e-2}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "clip_norm": 1.0, "lrd": 0.9}),
    "ExponentialLR": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.5}
    ),
}


@pytest.mark.parametrize("name", PYRO_OPTIMIZERS)
def test_pyros_optimizers_go_on(tmp_path, name):
    """A pair of pyro.param, whose names are the user's own."""

    def trained(folder, epochs, **options):
        mine = resolve(str(PAIRS / "params_only.py"))
        run = train(mine, folder, epochs, optimizer=PYRO_OPTIMIZERS[name](), **options)
        return [p.detach().clone() for p in run.model.scope.params.values()]

    want = trained(None, 4)
    trained(tmp_path, 2)
    assert same(trained(tmp_path, 4, resume=True), want)


def test_pyros_optimizers_go_on_under_other_names(tmp_path):
    straight, pair = linear(), linear()
    train(straight, None, epochs=4, optimizer=PYRO_OPTIMIZERS["Adam"]())
    train(pair, tmp_path, epochs=2, optimizer=PYRO_OPTIMIZERS["Adam"]())
    pair = linear()  # a new object, and so a new name, as in another process that made others before
    train(pair, tmp_path, epochs=4, optimizer=PYRO_OPTIMIZERS["Adam"](), resume=True)
    assert same(weights(pair), weights(straight))


def test_pyros_rates_per_parameter_go_on(tmp_path):
    def adam():
        return pyro.optim.Adam(lambda name: {"lr": 1e-2})

    train(resolve(str(PAIRS / "params_only.py")), tmp_path, optimizer=adam())
    train(resolve(str(PAIRS / "params_only.py")), tmp_path, epochs=4, optimizer=adam(), resume=True)


class Maker:
    """A function of parameters that is an object."""

    def __call__(self, params):
        return torch.optim.Adam(params, lr=1e-2)


def test_an_optimizer_made_by_an_object_goes_on(tmp_path):
    straight, pair = linear(), linear()
    train(straight, None, epochs=4)
    train(pair, tmp_path, optimizer=Maker())
    pair = linear()
    train(pair, tmp_path, epochs=4, optimizer=Maker(), resume=True)
    assert same(weights(pair), weights(straight))
