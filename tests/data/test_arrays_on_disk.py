"""Arrays that a .npy file holds: rows read on demand give what the same rows in memory give, to the last bit."""

import numpy as np
import pytest
import torch

from ppvae import data, fit, load, log_marginal
from ppvae.cli.main import main
from ppvae.data.column_conversion import as_column
from ppvae.errors import UsageError
from ppvae.models import LinearGaussian


@pytest.fixture
def numbers(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(300, 4)))
    return tmp_path / "x.npy"


def trained_on(x):
    torch.manual_seed(0)
    pair = LinearGaussian(4, 2)
    run = fit(pair.model, pair.mean_field, x, epochs=2, batch_size=50, progress=False)
    est = log_marginal(run.model, run.guide, x, num_particles=10, proposal="guide", progress=False)
    return run.metrics["loss"], est.log_px


def test_rows_read_from_an_array_on_disk_train_and_evaluate_as_those_in_memory(numbers):
    held, stored = (data.load(numbers, lazy=lazy) for lazy in (False, True))
    for one, other in zip(held, stored, strict=True):
        assert isinstance(other, data.LazySplit)
        assert not isinstance(one, data.LazySplit)
        assert one.digest == other.digest
        assert one.description == other.description
        assert torch.equal(one.read(), other.read())
        assert torch.equal(one.head(3).read(), other.head(3).read())
    loss, log_px = trained_on(held[0])
    loss_stored, log_px_stored = trained_on(stored[0])
    assert loss == loss_stored
    assert torch.equal(log_px, log_px_stored)


@pytest.mark.parametrize("noise", [{}, {"binarize": "dynamic"}, {"dequantize": True}, {"flat": False}])
def test_the_digest_of_grey_levels_on_disk_is_that_in_memory(tmp_path, noise):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (20, 6, 6), np.uint8))
    one, other = (data.load(tmp_path / "x.npy", lazy=lazy, **noise)[0] for lazy in (False, True))
    assert one.digest == other.digest
    assert one.shape == other.shape
    torch.manual_seed(0)
    drawn = one.read([3, 5])
    torch.manual_seed(0)
    assert torch.equal(drawn, other.read([3, 5]))


def test_only_what_lies_on_disk_is_read_on_demand(tmp_path, numbers):
    np.savez(tmp_path / "x.npz", x=np.zeros((10, 2)))
    for path, options in ((tmp_path / "x.npz", {}), (numbers, {"missing": True})):
        with pytest.raises(UsageError, match=r"lazy: expected images, or a \.npy file .* numpy\.save\(path, x\)"):
            data.load(path, lazy=True, **options)


def test_a_mapped_array_is_used_in_place_and_never_written_to(numbers):
    mapped = np.load(numbers, mmap_mode="r")
    x = as_column(mapped, "x")
    before = numbers.read_bytes()
    x[0] = 7.0
    assert x.dtype == torch.float64
    assert float(x[0, 0]) == 7.0
    assert float(mapped[0, 0]) != 7.0
    assert numbers.read_bytes() == before
    assert torch.equal(x[1:], torch.from_numpy(np.load(numbers))[1:])
    assert torch.equal(as_column(mapped[5:9], "x"), torch.from_numpy(np.load(numbers)[5:9]))  # a view: copied
    loss = trained_on(mapped.astype(np.float32))[0]
    np.save(numbers, np.load(numbers).astype(np.float32))
    assert trained_on(np.load(numbers, mmap_mode="r"))[0] == loss


@pytest.mark.slow
def test_commands_read_rows_on_demand(numbers, tmp_path, capsys):
    for name, lazy in (("held", []), ("stored", ["--lazy"])):
        data_flags = ["--data", str(numbers), "--binarize", "none", *lazy]
        pair = ["ppvae.models:linear_gaussian", "--latent", "2"]
        small = ["--epochs", "2", "--no-report", "--runs", str(tmp_path / "runs"), "--name", name]
        assert main(["fit", *pair, *data_flags, *small]) == 0
        assert main(["evaluate", str(tmp_path / "runs" / name), "--num-particles", "20", "--proposal", "guide"]) == 0
    held, stored = (load(tmp_path / "runs" / name) for name in ("held", "stored"))
    assert held.config["fit"]["digest"] == stored.config["fit"]["digest"]
    assert held.metrics["valid_elbo"] == stored.metrics["valid_elbo"]
