"""Products inside networks in bfloat16, and batches that are cut so that any number of particles fits."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pyro
import pytest
import torch

from ppvae import VAE, data, fit, likelihoods, log_marginal, models, nn, objectives, posteriors, priors
from ppvae.compilation import graph as graphs
from ppvae.compilation import inductor_passes, precision
from ppvae.compilation.graph import capture
from ppvae.compilation.precision import layer_precision
from ppvae.errors import CheckpointError, UsageError
from ppvae.evaluation.importance import compiled_weights as compiled
from ppvae.inference.svi import SVI
from ppvae.training import checkpoint

SGD = functools.partial(torch.optim.SGD, lr=1e-4)


def images(count: int) -> torch.Tensor:
    return data.load("digits", binarize="fixed")[0].read()[:count]


def vae(conv: bool = False) -> VAE:
    torch.manual_seed(0)
    encoder, decoder = nn.mlp(64, 6, hidden=(20,)), nn.mlp(3, 64, hidden=(20,))
    if conv:
        small: dict[str, Any] = {"channels": (8,), "hidden": 16}  # each layer more takes seconds to compile
        encoder, decoder = nn.conv_encoder((1, 8, 8), 6, **small), nn.conv_decoder(3, (1, 8, 8), **small)
    return VAE(priors.StandardNormal(3), likelihoods.Bernoulli(decoder), posteriors.DiagonalNormal(encoder))


LAYERS = (
    torch.nn.Linear(5, 7), torch.nn.Linear(5, 7, bias=False), torch.nn.Conv1d(5, 7, 3), torch.nn.Conv2d(5, 6, 3, 2, 1),
    torch.nn.ConvTranspose2d(5, 6, 3, stride=2, padding=1, output_padding=1), torch.nn.Conv2d(5, 5, 3, groups=5),
)  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_layer_multiplies_bfloat16_numbers_and_goes_on_in_float32(layer):
    x = torch.randn(4, 5, *(8,) * (layer.weight.dim() - 2))
    with layer_precision("bf16"):
        found = layer(x)
    exact = copy.deepcopy(layer).double()
    numbers = {"weight": exact.weight.detach().float().bfloat16().double()}
    expected = torch.func.functional_call(exact, numbers, (x.bfloat16().double(),))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=2**-7, atol=2e-3)
    assert not torch.equal(found, layer(x))


def layer_gradients(layer, x):
    """The output of a layer in bf16, and the gradients of its input and parameters."""
    with torch.enable_grad(), layer_precision("bf16"):
        x = x.detach().requires_grad_()
        out = layer(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


@pytest.mark.skipif(not precision.has_bfloat16_products(), reason="this processor has only one of both paths")
@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_processor_without_bfloat16_products_computes_the_same_numbers(layer, monkeypatch):
    x = torch.randn(40, 5, *(8,) * (layer.weight.dim() - 2), generator=torch.Generator().manual_seed(0))
    native = layer_gradients(layer, x)
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda: False)
    emulated = layer_gradients(layer, x)
    with torch.enable_grad():
        unrounded = layer(y := x.clone().requires_grad_())
        unrounded = [unrounded.detach(), *torch.autograd.grad(unrounded.square().sum(), [y, *layer.parameters()])]
    for a, b, c in zip(native, emulated, unrounded, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=2**-7, atol=2**-8 * float(a.abs().max()))
        assert (a - b).norm() < 0.2 * (a - c).norm()  # sums in another order: a few numbers round the other way


def test_products_of_rounded_factors_keep_their_roundings_when_compiled(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda: False)
    layer, x = torch.nn.Linear(40, 30), torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    graph = capture(lambda: layer_gradients(layer, x), list(layer.parameters()), (x,))
    compiled, eager = graph.compile((x,), {})(x), layer_gradients(layer, x)
    for a, b in zip(compiled, eager, strict=True):
        assert float((a - b).norm()) < 1e-4 * float(b.norm())
    inductor_passes.keep_bfloat16_roundings(graph.module)
    targets = [node.target for node in graph.module.graph.nodes]
    assert targets.count(torch.ops.ppvae.round_to_bfloat16.default) == 6
    assert torch.ops.aten._to_copy.default not in targets
    assert all(map(torch.equal, graph(x), eager))


def test_what_is_no_layer_stays_in_float32():
    a = torch.tensor([[1.001]])
    with layer_precision("bf16"):
        assert (a @ a).item() == pytest.approx(1.001**2, abs=1e-6)
        assert pyro.distributions.Normal(a, 1.001).log_prob(a).dtype == torch.float32
        assert torch.nn.functional.linear(a.double(), a.double()).item() == a.double().item() ** 2


@pytest.mark.parametrize(
    ("products", "conv", "objective"),
    [
        *((p, False, objectives.ELBO()) for p in ("native", "float32")),
        ("float32", True, objectives.ELBO()),
        pytest.param("native", True, objectives.ELBO(), marks=pytest.mark.slow),
        ("native", False, objectives.IWAE(4, "dreg")),
        pytest.param("native", True, objectives.IWAE(4, "dreg"), marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_in_bfloat16_are_the_eager_ones_up_to_its_steps(products, conv, objective, monkeypatch, caplog):
    if products == "native" and isinstance(objective, objectives.ELBO) and not precision.has_bfloat16_products():
        pytest.skip("this processor has only one of both paths")
    if products == "float32":
        monkeypatch.setattr(precision, "has_bfloat16_products", lambda: False)
    x = images(40)
    x = x.view(-1, 1, 8, 8) if conv else x
    found = []
    for kernels in ("eager", "graph", "compiled"):
        pair = vae(conv)
        svi = SVI(pair.model, pair.guide, SGD, objective)
        svi.precision = "bf16"
        svi.use(kernels, settled=True)
        torch.manual_seed(1)
        with pyro.validation_enabled(False):
            losses = torch.tensor([svi.step(x) for _ in range(20)])
        assert svi.kernels == kernels, caplog.text
        found.append((losses, torch.cat([p.detach().flatten() for p in svi.params])))
    (eager, weights), *others = found
    for losses, again in others:
        assert torch.allclose(losses, eager, rtol=2e-3)
        assert (again - weights).norm() < 2e-3 * weights.norm()
    assert torch.equal(others[0][0], eager)  # the graph has the very same operations


def test_fit_in_bfloat16_reports_and_evaluates_in_float32(tmp_path):
    x, pair = images(200), vae()
    run = fit(pair.model, pair.guide, x, valid=x, epochs=2, precision="bf16", directory=tmp_path / "run")
    again = fit(vae().model, vae().guide, x, valid=x, epochs=2)
    assert run.config["fit"]["precision"] == "bf16"
    assert abs(run.metrics["valid_elbo"] - again.metrics["valid_elbo"]) < 0.05
    with pytest.raises(CheckpointError, match="cannot resume with precision"):
        fit(pair.model, pair.guide, x, valid=x, epochs=3, directory=tmp_path / "run", resume=True)


def test_precisions_that_do_not_exist_are_refused():
    pair = vae()
    with pytest.raises(UsageError, match="expected one of float32, tf32, bf16; found 'fp8'"):
        fit(pair.model, pair.guide, images(20), epochs=1, precision="fp8")
    with pytest.raises(UsageError, match="'tf32' expects a GPU, found 'cpu'"):
        fit(pair.model, pair.guide, images(20), epochs=1, precision="tf32")
    for name in ("fp8", "tf32"):
        with pytest.raises(UsageError, match=f"precision: .*found .*({name}|cpu)"):
            log_marginal(pair.model, pair.guide, images(20), precision=name, proposal="guide")


class Rounded(torch.nn.Module):
    """A layer that multiplies bfloat16 numbers, written out in float32."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        product = x.bfloat16().float() @ self.layer.weight.bfloat16().float().t()
        return product.bfloat16().float() + self.layer.bias


def test_an_evaluation_in_bfloat16_is_of_the_model_whose_layers_round():
    x, pair = images(60), vae()
    options = {"num_particles": 200, "posterior_draws": 2, "progress": False, "proposal": "guide"}
    found = log_marginal(pair.model, pair.guide, x, precision="bf16", **options)
    usual = log_marginal(pair.model, pair.guide, x, **options)
    few = functools.partial(log_marginal, pair.model, pair.guide, x[:50], num_particles=100, proposal="guide")
    moved = few(precision="bf16").log_px - few().log_px
    for net in (pair.likelihood.net, pair.posterior.net):
        for name, layer in list(net.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                net.set_submodule(name, Rounded(layer))
    own = log_marginal(pair.model, pair.guide, x, **options)
    near, off = (found.log_px - own.log_px).abs().max(), (found.log_px - usual.log_px).abs().max()
    assert float(near) < 0.1 * float(off)  # sums in another order may round another way
    assert usual.settings == own.settings == {}
    assert found.settings == {"precision": "bf16"}
    assert found.notes == (
        f"products in bf16: with 100 particles log p(x) of the first 50 data is {float(moved.mean()):+.4f} nats from "
        f"float32 on average, {float(moved.abs().max()):.4f} at most",
    )
    assert not usual.notes


@pytest.mark.parametrize(("off", "taken"), [(0.0, True), (0.3, False)])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_compiled_graph_that_gives_other_weights_is_refused(off, taken, precision, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(compiled, "SECONDS_PER_NODE", 0.0)
    monkeypatch.setattr(graphs, "compile_module", lambda module, *_: lambda *a: [t + off for t in module(*a)])
    x, pair = images(50), vae()
    options = {"num_particles": 600, "precision": precision, "progress": False, "proposal": "guide"}
    eager, found = (log_marginal(pair.model, pair.guide, x, compile=c, **options) for c in (False, True))
    assert torch.allclose(eager.log_px, found.log_px, atol=1e-4)
    assert ("other weights" in caplog.text) != taken


def test_a_vamp_prior_is_compiled_and_its_note_is_of_its_own_components(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(compiled, "SECONDS_PER_NODE", 0.0)
    x, pair = images(50), vae()
    with torch.no_grad():
        for p in pair.posterior.parameters():
            p.mul_(4)
    pair.prior = priors.VampPrior.from_data(pair.posterior, x, components=10)
    few = functools.partial(
        log_marginal, pair.model, pair.guide, x, num_particles=100, progress=False, proposal="guide"
    )
    moved = few(precision="bf16").log_px - few().log_px
    found = log_marginal(
        pair.model, pair.guide, x, num_particles=600, precision="bf16", progress=False, proposal="guide"
    )
    assert f"{float(moved.mean()):+.4f} nats" in found.notes[0]
    assert f"{float(moved.abs().max()):.4f} at most" in found.notes[0]
    assert not [r for r in caplog.records if r.name == "ppvae"]


def test_compiled_log_weights_in_bfloat16_are_those_of_the_pair(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(compiled, "SECONDS_PER_NODE", 0.0)
    made, real = [], graphs.compile_module
    monkeypatch.setattr(graphs, "compile_module", lambda *a: made.append(real(*a)) or made[-1])
    x, pair = images(100), vae()
    options = {"num_particles": 1000, "precision": "bf16", "progress": False, "proposal": "guide"}
    eager, graph = (log_marginal(pair.model, pair.guide, x, compile=c, **options) for c in (False, True))
    assert len(made) == 1
    assert not [r for r in caplog.records if r.name == "ppvae"]
    assert torch.allclose(eager.log_px, graph.log_px, atol=2e-3)
    assert not torch.equal(eager.log_px, graph.log_px)


def mixture(rows: int, objective: objectives.IWAE, x: torch.Tensor, **options) -> torch.Tensor:
    """The parameters after two epochs of a pair whose bound has no noise: its latent is summed out."""
    torch.manual_seed(0)
    pair = models.GaussianMixture(2, 3)
    with pyro.get_param_store().scope():
        fit(
            pair.model, pair.guide, x, epochs=2, batch_size=25, objective=objective, optimizer=SGD, rows=rows, **options
        )
        return torch.cat([p.detach().flatten() for p in pair.parameters()])


@pytest.mark.parametrize("rows", [1, 12, 75, 20_000])
def test_a_cut_batch_has_the_gradient_of_the_whole(rows):
    x = torch.randn(55, 2, generator=torch.Generator().manual_seed(0))  # batches of 25, 25 and 5
    whole = mixture(10**9, objectives.IWAE(3), x)
    assert torch.allclose(mixture(rows, objectives.IWAE(3), x), whole, atol=1e-6)


def test_a_cut_batch_is_one_step_of_a_schedule():
    bound = objectives.ELBO(3, warmup=4)
    pair = vae()
    fit(pair.model, pair.guide, images(50), epochs=2, batch_size=25, objective=bound, rows=12)
    assert bound.state_dict()["step"] == 4


def test_no_more_rows_than_asked_for_go_through_the_pair():
    x, pair = images(30), vae()
    rows: list[int] = []
    pair.likelihood.net.register_forward_hook(lambda _, z, out: rows.append(z[0].shape[:-1].numel()))
    fit(pair.model, pair.guide, x, epochs=1, batch_size=30, rows=100, objective=objectives.IWAE(40))
    assert 80 in rows
    assert max(rows) <= 100


def test_the_layers_of_a_run_are_timed_by_shape(monkeypatch):
    timed = []
    cost = {"float32": 2.0, "bf16": 3.0}
    seconds = lambda layer, inputs, settings, name: timed.append(inputs[0].shape) or cost[name]  # noqa: E731
    monkeypatch.setattr(precision, "_seconds_of_layer", seconds)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 5))
    before = torch.get_rng_state()
    assert precision.slowdown_of_bfloat16(lambda: net(torch.zeros(3, 4)), gradients=True) == pytest.approx(1.5)
    assert torch.equal(before, torch.get_rng_state())
    assert set(timed) == {(3, 4)}
    assert len(timed) == 2 * 2 * (precision.TIMING_ROUNDS + 1)  # two kinds of layers in two precisions
    assert precision.slowdown_of_bfloat16(lambda: torch.zeros(3).exp(), gradients=True) == 1.0


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Linear(6, 5, bias=False),
        torch.nn.Conv2d(3, 2, 3, padding=1),
        torch.nn.ConvTranspose2d(3, 2, 3, stride=2),
    ],
)
def test_any_layer_can_be_timed(layer, gradients):
    x = torch.zeros(4, 6) if isinstance(layer, torch.nn.Linear) else torch.zeros(4, 3, 6, 6)
    assert precision.slowdown_of_bfloat16(lambda: layer(x), gradients) > 0


@pytest.mark.parametrize(("slowdown", "taken"), [(9.0, "float32"), (0.5, "bf16")])
def test_auto_takes_the_faster_precision_and_a_resumed_run_the_same(slowdown, taken, monkeypatch, caplog, tmp_path):
    x, pair = images(60), vae()
    auto = functools.partial(fit, pair.model, pair.guide, x, batch_size=20, precision="auto", directory=tmp_path / "a")
    monkeypatch.setattr(precision, "slowdown_of_bfloat16", lambda run, gradients: (run() and None) or slowdown)
    run = auto(epochs=1)
    assert ("layers take 9.00 times as long in bf16 as in float32" in caplog.text) == (taken == "float32")
    assert checkpoint.read_with_digest(tmp_path / "a" / "checkpoints")[1]["precision"] == taken
    pair = vae()
    expected = fit(pair.model, pair.guide, x, batch_size=20, precision=taken, epochs=2)
    monkeypatch.setattr(precision, "slowdown_of_bfloat16", lambda run, gradients: pytest.fail("chosen again"))
    pair = vae()
    run = fit(
        pair.model, pair.guide, x, batch_size=20, precision="auto", directory=tmp_path / "a", epochs=2, resume=True
    )
    assert run.metrics["loss"] == expected.metrics["loss"]


@pytest.mark.parametrize(("slowdown", "taken"), [(9.0, "float32"), (0.5, "bf16")])
def test_an_evaluation_takes_the_faster_precision(slowdown, taken, monkeypatch, caplog):
    x, pair = images(60), vae()
    monkeypatch.setattr(precision, "slowdown_of_bfloat16", lambda run, gradients: (run() and None) or slowdown)
    found, expected = (
        log_marginal(pair.model, pair.guide, x, num_particles=200, precision=p, progress=False, proposal="guide")
        for p in ("auto", taken)
    )
    assert torch.equal(found.log_px, expected.log_px)
    assert found.settings == expected.settings
    assert ("9.00 times as long" in caplog.text) == (taken == "float32")


def test_auto_is_no_precision_of_layers():
    with pytest.raises(UsageError, match="expected one of float32, tf32, bf16; found 'auto'"), layer_precision("auto"):
        pass
