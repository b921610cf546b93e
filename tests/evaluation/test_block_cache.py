"""An evaluation that is interrupted goes on: the same numbers, of the same evaluation only, at little cost."""

import json

import numpy as np
import pyro
import pytest
import torch

from ppvae import log_marginal
from ppvae.errors import CheckpointError, UsageError
from ppvae.evaluation import block_cache, blocks
from ppvae.evaluation.block_cache import BlockCache
from ppvae.evaluation.importance import sampler
from ppvae.models import LinearGaussian

pytestmark = pytest.mark.usefixtures("float64")


def oracle(count=170):
    torch.manual_seed(1)
    pair = LinearGaussian(6, 2, 0.7).requires_grad_(False)
    return pair, torch.randn(count, 6)


@pytest.fixture
def stops(monkeypatch):
    """Ctrl-C in the third block, once; and the numbers of the blocks that were begun."""
    real, calls = sampler.ImportanceSampler.__call__, []

    def interrupted(self, block, compiled=None):
        calls.append(block.number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, block, compiled)

    monkeypatch.setattr(sampler.ImportanceSampler, "__call__", interrupted)
    return calls


@pytest.mark.parametrize("particles", [120, "auto"])
@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_an_interrupted_evaluation_goes_on_to_the_same_numbers(tmp_path, monkeypatch, stops, particles, seconds):
    """Whether each block has a file of its own, or they wait for one: an interruption loses none."""
    monkeypatch.setattr(blocks, "SECONDS", seconds)
    pair, x = oracle()
    words = {"num_particles": particles, "max_particles": 800, "seed": 2, "posterior_draws": 2, "bounds": (7,)}
    words |= {"proposal": "guide"}
    with pytest.raises(KeyboardInterrupt):
        log_marginal(pair.model, pair.mean_field, x, directory=tmp_path / "kept", **words)
    files = sorted(p.name for p in (tmp_path / "kept").iterdir())
    assert files == ["block-00000.npz", *(["block-00001.npz"] if seconds == 0 else []), "evaluation.json"]
    again = log_marginal(pair.model, pair.mean_field, x, directory=tmp_path / "kept", **words)
    assert stops == [0, 1, 2, 2, 3]
    whole = log_marginal(pair.model, pair.mean_field, x, **words)
    assert len(stops) == 9
    for name, value in whole.per_datum().items():
        assert torch.equal(value.nan_to_num(), again.per_datum()[name].nan_to_num()), name
        assert value.dtype == again.per_datum()[name].dtype
    assert torch.equal(whole.bound(7), again.bound(7))
    assert torch.equal(whole.posterior["z"], again.posterior["z"])
    log_marginal(pair.model, pair.mean_field, x, directory=tmp_path / "kept", **words)
    assert len(stops) == 9  # nothing was left to do


def test_blocks_of_another_evaluation_are_refused(tmp_path):
    pair, x = oracle(60)
    words = {"num_particles": 30, "directory": tmp_path / "kept", "proposal": "guide"}
    log_marginal(pair.model, pair.mean_field, x, **words)
    for changed, name in (
        ({"num_particles": 31}, "num_particles is 30 there and 31 here"),
        ({"num_particles": "auto"}, "num_particles is 30 there and 'auto' here|max_particles is None"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"posterior_draws": 1}, "posterior_draws is 0"),
        ({"bounds": (3,)}, "bounds is"),
    ):
        with pytest.raises(UsageError, match=name):
            log_marginal(pair.model, pair.mean_field, x, **(words | changed))
    with pytest.raises(UsageError, match="data is"):
        log_marginal(pair.model, pair.mean_field, x + 1, **words)
    with torch.no_grad():
        pair.loc.add_(1e-3)
    with pytest.raises(UsageError, match="parameters is"):
        log_marginal(pair.model, pair.mean_field, x, **words)


def test_a_buffer_is_a_parameter_too(tmp_path):
    pair, x = oracle(10)
    norm = torch.nn.BatchNorm1d(6)

    def guide(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(norm(x)[:, :2] * 0.1, 1.0).to_event(1))

    guide(x)
    log_marginal(pair.model, guide, x, num_particles=30, directory=tmp_path, proposal="guide")
    norm.running_mean.add_(0.5)
    with pytest.raises(UsageError, match="parameters is"):
        log_marginal(pair.model, guide, x, num_particles=30, directory=tmp_path, proposal="guide")


def test_short_parts_share_a_file(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(block_cache.time, "monotonic", lambda: now[0])
    with BlockCache(tmp_path / "kept", {"a": 1}, seconds=5.0) as store:
        for i in range(7):
            now[0] += 2.0
            store.part(f"part-{i}", lambda i=i: {"x": torch.tensor([i]), "posterior/z": torch.ones(2)})
    names = sorted(p.name for p in (tmp_path / "kept").glob("*.npz"))
    assert names == ["part-0.npz", "part-3.npz", "part-6.npz"]
    again = BlockCache(tmp_path / "kept", {"a": 1})
    for i in range(7):
        part = again.part(f"part-{i}", dict)
        assert int(part["x"]) == i
        assert torch.equal(part["posterior/z"], torch.ones(2))


def test_nothing_is_written_before_there_is_something(tmp_path):
    with BlockCache(tmp_path / "kept", {"a": 1}, seconds=5.0):
        pass
    assert not (tmp_path / "kept").exists()


def test_folders_that_are_damaged_are_named(tmp_path):
    with BlockCache(tmp_path, {"a": 1}) as store:
        store.part("one", lambda: {"x": torch.ones(3)})
    path = tmp_path / "one.npz"
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"<html>"):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"one\.npz: damaged"):
            BlockCache(tmp_path, {"a": 1})
    np.savez(path, x=np.ones(3))  # numbers, but of no part
    with pytest.raises(CheckpointError, match=r"one\.npz: damaged"):
        BlockCache(tmp_path, {"a": 1})
    path.write_bytes(content)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        BlockCache(tmp_path, {"a": 1})
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(CheckpointError, match="belong to nothing"):
        BlockCache(tmp_path, {"a": 1})
    (tmp_path / "evaluation.json").write_text(json.dumps({"a": 1}))
    assert torch.equal(BlockCache(tmp_path, {"a": 1}).part("one", dict)["x"], torch.ones(3))
