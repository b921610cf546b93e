"""What training and evaluation say of a pair that fails: the cause, the row of the data, a cure that works."""

import functools
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppvae import check, fit, generate, log_marginal
from ppvae.errors import ContractError, PpvaeError, TrainingError

RATE = "smaller learning rate"


def linear_pair(dims, latent=2, scale=torch.exp):
    """A plain pair of two linear networks, and nothing that keeps its scale in bounds."""
    torch.manual_seed(0)
    enc, dec = nn.Linear(dims, 2 * latent), nn.Linear(latent, dims)

    def model(x):
        pyro.module("dec", dec)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(dec(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("enc", enc)
        with pyro.plate("data", len(x)):
            loc, s = enc(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale(s)).to_event(1))

    return model, guide


# Types


@pytest.mark.parametrize(
    ("x", "cure", "cast"),
    [
        (torch.rand(30, 4, dtype=torch.float64), r"are float64, the networks float32: pass x\.float\(\)", torch.float),
        (torch.randint(0, 3, (30, 4)), r"are int64, the networks float32: pass x\.float\(\)", torch.float),
        (torch.rand(30, 4) > 0.5, r"are bool, the networks float32: pass x\.float\(\)", torch.float),
        (torch.rand(30, 4).half(), r"are float16, the networks float32: pass x\.float\(\)", torch.float),
        ((torch.rand(30, 4) * 255).byte(), r"are uint8, the networks float32: pass x\.float\(\)", torch.float),
    ],
    ids=["float64", "int64", "bool", "float16", "uint8"],
)
def test_data_of_another_type_than_the_networks(x, cure, cast):
    for held in (x, x.numpy(), x.tolist() if x.dtype is torch.int64 else x):
        for call in CALLS.values():
            with pytest.raises(ContractError, match=cure):
                call(*linear_pair(4), held)
    if x.dtype is not torch.uint8:  # 255 wants to be scaled, too
        for call in CALLS.values():
            call(*linear_pair(4), x.to(cast))


CALLS = {
    "check": check,
    "fit": lambda model, guide, x: fit(model, guide, x, epochs=1),
    "log_marginal": lambda model, guide, x: evaluated(model, guide, x),
    "generate": lambda model, guide, x: generated(model, guide, x),
}


def evaluated(model, guide, x):
    return log_marginal(model, guide, x, num_particles=5, proposal="guide")


def generated(model, guide, x):
    return generate.reconstructions(model, guide, x)


def test_networks_of_float64_say_double():
    enc = nn.Linear(4, 4).double()

    def guide(x):
        pyro.module("enc", enc)
        with pyro.plate("data", len(x)):
            loc, s = enc(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, s.exp()).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand((*z.shape[:-1], 4)).to_event(1), obs=x)

    with pytest.raises(ContractError, match=r"pass x\.double\(\)"):
        fit(model, guide, torch.rand(20, 4), epochs=1)
    fit(model, guide, torch.rand(20, 4).double(), epochs=1)


def test_a_second_column_of_another_type():
    embed = nn.Linear(1, 3)

    def model(x, label):
        pyro.module("embed", embed)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + embed(label), 1.0).to_event(1), obs=x)

    def guide(x, label):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    x, label = torch.randn(20, 3), torch.randint(0, 2, (20, 1))
    with pytest.raises(ContractError, match=r"are int64, the networks float32: pass data\[1\]\.float\(\)"):
        fit(model, guide, (x, label), epochs=1)
    fit(model, guide, (x, label.float()), epochs=1)


# Scale


def test_data_of_a_scale_that_no_learning_rate_helps():
    x = torch.rand(200, 262, generator=torch.Generator().manual_seed(0)) * 300
    for call in CALLS.values():
        with pytest.raises(PpvaeError, match=r"The data reach 300.*: scale them, as by x / 300") as refused:
            call(*linear_pair(262), x)
        assert RATE not in str(refused.value)
    for call in CALLS.values():
        call(*linear_pair(262), x / 300)


def test_the_first_step_names_the_scale():
    """Where the inspection passes: large data in rows that it does not look at."""
    x = torch.rand(300, 20, generator=torch.Generator().manual_seed(0))
    x[100:] *= 1e4
    x[-1] = 1e4
    with pytest.raises(TrainingError) as refused:
        fit(*linear_pair(20), x, epochs=1, batch_size=100)
    text = str(refused.value)
    assert text.startswith("step 1 (epoch 1)")
    assert re.search(r"The data reach (1e\+04|9\.99e\+03), where.*: scale them, as by x / \1", text)
    assert RATE not in text


@pytest.mark.parametrize("batch_size", [5, 40])
def test_the_row_of_the_data_is_named(batch_size):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x[33] = 1e30
    model, guide = linear_pair(3, scale=nn.functional.softplus)
    words = r"Row 33 of the (data|batch) reaches 1e\+30, the others \d\.\d+: mend that row, or leave it out"
    with pytest.raises(PpvaeError, match=words) as refused:
        fit(model, guide, x, epochs=3, batch_size=batch_size)
    assert RATE not in str(refused.value)
    x[33] = 0
    fit(model, guide, x, epochs=3, batch_size=batch_size)


def test_steps_that_are_too_large_are_called_so():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    wild = functools.partial(torch.optim.SGD, lr=1e25)
    with pytest.raises(TrainingError, match=rf"^step 2 \(epoch 1\): .*{RATE}"):
        fit(*linear_pair(3, scale=nn.functional.softplus), x, epochs=5, batch_size=10, optimizer=wild)
    fit(*linear_pair(3, scale=nn.functional.softplus), x, epochs=5, batch_size=10)


def test_a_first_step_that_the_pair_itself_spoils():
    def model(x):
        w = pyro.param("w", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + 0 * torch.sqrt(w.abs()), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, pyro.param("s", torch.ones(3)).exp()).to_event(1))

    with pytest.raises(TrainingError, match=r"step 1 \(epoch 1\): the gradient is nan.*No learning rate") as refused:
        fit(model, guide, torch.randn(20, 3), epochs=1)
    assert "'w'" in str(refused.value)


# Later batches


def sequence_pair(total):
    """An encoder that cuts a batch to its longest sequence, unless `total` says how long it is."""
    torch.manual_seed(0)
    gru = nn.GRU(3, 4, batch_first=True)

    def keep(x, n):
        return (torch.arange(x.shape[1]) < n[:, None])[..., None]

    def model(x, n):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1], 2), 1.0).mask(keep(x, n)).to_event(2))
            loc = z.sum(-1, keepdim=True).expand((*z.shape[:-1], 3))
            pyro.sample("x", dist.Normal(loc, 1.0).mask(keep(x, n)).to_event(2), obs=x)

    def guide(x, n):
        pyro.module("gru", gru)
        packed = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        length = x.shape[1] if total else None
        h = nn.utils.rnn.pad_packed_sequence(gru(packed)[0], batch_first=True, total_length=length)[0]
        loc, s = h.chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, s.exp()).mask(keep(x, n)).to_event(2))

    return model, guide


def sequences():
    g = torch.Generator().manual_seed(0)
    x, n = torch.randn(200, 9, 3, generator=g), torch.randint(2, 10, (200,), generator=g)
    n[:50:5] = 9
    n[50:150:5] = 9
    n[150:] = n[150:].clamp(max=5)
    return x, n


def test_a_later_block_is_explained_as_the_first_is():
    x, n = sequences()
    check(*sequence_pair(False), (x[:50], n[:50]))
    words = r"rows 150 to 199 of the data.*longest sequence here has 5 of 9 steps.*total_length=x\.shape\[1\]"
    with pytest.raises(ContractError, match=words):
        log_marginal(*sequence_pair(False), (x, n), num_particles=10, proposal="guide")
    with pytest.raises(ContractError, match=r"a batch of shape.*longest sequence here has 5 of 9 steps"):
        check(*sequence_pair(False), (x[150:], n[150:]))
    assert log_marginal(*sequence_pair(True), (x, n), num_particles=10, proposal="guide").log_px.isfinite().all()


def test_a_later_batch_and_validation_are_explained_too():
    x, n = sequences()
    valid = (x[150:], n[150:])
    with pytest.raises(ContractError, match=r"valid rows 0 to 49 of the data.*total_length=x\.shape\[1\]"):
        fit(*sequence_pair(False), (x[:50], n[:50]), valid=valid, epochs=1)
    with pytest.raises(TrainingError, match=r"step \d+ \(epoch 1\).*total_length=x\.shape\[1\]") as refused:
        fit(*sequence_pair(False), (x, n), epochs=1, batch_size=2)
    assert RATE not in str(refused.value)
    fit(*sequence_pair(True), (x, n), valid=valid, epochs=1, batch_size=10)


def test_what_goes_wrong_beside_the_pair_is_not_put_on_it():
    from ppvae.inference.contract.run_failure import explain_failures

    model, guide = linear_pair(3)
    with (
        pytest.raises(RuntimeError, match=r"^elsewhere$"),
        explain_failures(model, guide, (torch.zeros(4, 3),), "rows"),
    ):
        raise RuntimeError("elsewhere")


# Compiled networks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_network_under_torch_compile_is_taken_as_it_is(backend):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Linear(6, 4))
    compiled = torch.compile(plain, backend=backend)

    def pair(enc):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                loc = z.sum(-1, keepdim=True).expand((*z.shape[:-1], 8))
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        def guide(x):
            pyro.module("enc", enc)
            with pyro.plate("data", len(x)):
                loc, s = enc(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, s.exp()).to_event(1))

        return model, guide

    x = torch.randn(150, 8)
    assert "vectorised" in check(*pair(compiled), x)
    found, expected = (
        log_marginal(*pair(enc), x, num_particles=20, proposal="guide").log_px for enc in (compiled, plain)
    )
    assert torch.equal(found, expected)
    assert plain.training
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = fit(*pair(compiled), x, epochs=3, batch_size=50)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1  # steps go through the compiler
    assert run.metrics["loss"] < 60
