"""Laws of networks, over a dict of constructors, and what masked ones may see."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ppvae import nn
from tests.laws.law import Laws

Network = tuple[Callable[[], torch.nn.Module], tuple[int, ...], tuple[int, ...]]
SMALL = {"channels": (2, 3), "hidden": 4}
NETWORKS: dict[str, Network] = {
    "mlp": (lambda: nn.mlp(4, 5, hidden=(6,)), (4,), (5,)),
    "mlp without hidden layers": (lambda: nn.mlp(4, 5, hidden=()), (4,), (5,)),
    "gated mlp": (lambda: nn.gated_mlp(4, 5, hidden=(6, 7)), (4,), (5,)),
    "gated mlp without hidden layers": (lambda: nn.gated_mlp(4, 5, hidden=()), (4,), (5,)),
    "Gated": (lambda: nn.Gated(4, 5), (4,), (5,)),
    "Missing": (lambda: nn.Missing(nn.mlp(8, 5, hidden=(6,))), (4,), (5,)),
    "MaskedLinear": (lambda: nn.MaskedLinear(torch.ones(5, 4)), (4,), (5,)),
    "MaskedConv2d": (
        lambda: nn.Leading(nn.MaskedConv2d(2, 4, 3, colours=2, itself=True), event_dim=3), (2, 6, 5), (4, 6, 5)
    ),
    "Residual": (lambda: nn.Leading(nn.Residual(2, torch.nn.ELU), event_dim=3), (2, 6, 5), (2, 6, 5)),
    "encoder 28": (lambda: nn.conv_encoder((1, 28, 28), 5, **SMALL), (1, 28, 28), (5,)),
    "encoder 32 colour": (lambda: nn.conv_encoder((3, 32, 32), 5, **SMALL), (3, 32, 32), (5,)),
    "encoder 28 flat": (lambda: nn.conv_encoder((1, 28, 28), 5, **SMALL, flat=True), (784,), (5,)),
    "encoder 64 of four": (lambda: nn.conv_encoder((3, 64, 64), 5, (2, 2, 3, 4), 4), (3, 64, 64), (5,)),
    "encoder 6x10 of one": (lambda: nn.conv_encoder((1, 6, 10), 5, (2,), 4), (1, 6, 10), (5,)),
    "residual encoder 28": (lambda: nn.residual_encoder((1, 28, 28), 5, **SMALL), (1, 28, 28), (5,)),
    "residual encoder 64 flat": (
        lambda: nn.residual_encoder((1, 64, 64), 5, (2, 2, 2), 2, 4, flat=True), (4096,), (5,)
    ),
    "decoder 28": (lambda: nn.conv_decoder(4, (1, 28, 28), **SMALL), (4,), (1, 28, 28)),
    "decoder 32 colour": (lambda: nn.conv_decoder(4, (3, 32, 32), **SMALL), (4,), (3, 32, 32)),
    "decoder 28 flat": (lambda: nn.conv_decoder(4, (1, 28, 28), **SMALL, flat=True), (4,), (784,)),
    "decoder 64 of four": (lambda: nn.conv_decoder(4, (3, 64, 64), (4, 3, 2, 2), 4), (4,), (3, 64, 64)),
    "residual decoder 28": (lambda: nn.residual_decoder(4, (1, 28, 28), **SMALL), (4,), (1, 28, 28)),
    "residual decoder 64 flat": (
        lambda: nn.residual_decoder(4, (3, 64, 64), (3, 2), 2, 4, flat=True), (4,), (12288,)
    ),
}  # fmt: skip
Masked = tuple[Callable[[], torch.nn.Module], int]
MASKED: dict[str, Masked] = {  # and how many outputs a number
    "MADE": (lambda: nn.MADE(6, 2, hidden=(7,)), 1),
    "MADE without hidden layers": (lambda: nn.MADE(6, 2, hidden=()), 1),
    "MADE of three layers and outputs": (lambda: nn.MADE(6, 2, 3, hidden=(13, 5, 8)), 3),
    "MADE in an order of its own": (
        lambda: nn.MADE(6, 2, 2, hidden=(20, 20), order=torch.tensor([3, 1, 5, 0, 2, 4])),
        2,
    ),
    "MADE of one": (lambda: nn.MADE(1, 2, hidden=(4,)), 1),
    "PixelCNN": (lambda: pixel_cnn((1, 5, 4), 1), 1),
    "PixelCNN colour": (lambda: pixel_cnn((3, 3, 4), 1), 1),
    "PixelCNN colour levels flat": (lambda: pixel_cnn((3, 3, 3), 4, flat=True), 4),
}

law, masked_law = Laws(NETWORKS), Laws(MASKED)


def pixel_cnn(shape: tuple[int, int, int], outputs: int, flat: bool = False) -> nn.PixelCNN:
    decoder = torch.nn.Sequential(
        nn.mlp(2, 2 * shape[1] * shape[2], hidden=()), torch.nn.Unflatten(-1, (2, *shape[1:]))
    )
    return nn.PixelCNN(shape, decoder, 2, outputs, channels=4, layers=2, size=3, flat=flat)


def test_counts_its_networks(record_property: Callable[[str, object], None]) -> None:
    record_property("networks", [*NETWORKS, *MASKED])


@law()
def test_network_takes_any_leading_dims(name: str) -> None:
    torch.manual_seed(0)
    make, inside, outside = NETWORKS[name]
    net, x = make().double(), torch.randn(2, 3, *inside).double()
    y = net(x)
    assert y.shape == (2, 3, *outside)
    torch.testing.assert_close(y[1, 2], net(x[1, 2]))
    assert net(x[:0]).shape == (0, 3, *outside)


@law()
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    make, inside, _ = NETWORKS[name]
    net = make()
    net(torch.randn(5, *inside)).square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None, key
        assert bool((p.grad != 0).any()), key


@masked_law()
def test_masked_network_sees_the_past_and_all_of_it_but_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    make, outputs = MASKED[name]
    net = make().double()
    z, x = torch.randn(2).double(), torch.rand(net.event_shape).double()
    assert net(x, z).shape == (outputs * net.event_shape[0], *net.event_shape[1:])
    assert nn.sees_only_the_past(net, net.order, x, z)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v, z), x).reshape(outputs, x.numel(), x.numel())
    of = jacobian.abs().sum(0)[net.order][:, net.order] > 0
    if name.startswith("MADE"):
        seen = of.sum(1) == torch.arange(x.numel())
        assert seen.all() or name == "MADE of three layers and outputs"  # of widths below D some see less
    elif net.shape[0] == 1:
        width, starts = net.shape[2], torch.arange(1, x.numel()) % net.shape[2] == 0
        assert torch.equal(of.diagonal(-1), ~starts), "each pixel sees the one to its left"
        assert bool(of.diagonal(-width).all()), "each pixel sees the one above it"
    else:
        colours = net.shape[0]
        assert bool(of[colours - 1 :: colours, colours - 2 :: colours].diagonal().all()), "blue sees green"
    assert sorted(net.order.tolist()) == list(range(x.numel()))


@masked_law()
def test_masked_network_takes_any_leading_dims_and_feels_the_latent_everywhere(name: str) -> None:
    torch.manual_seed(0)
    net = MASKED[name][0]().double()
    x, z = torch.rand(3, *net.event_shape).double(), torch.randn(2, 3, 2).double()
    y = net(x, z)
    torch.testing.assert_close(y[1, 2], net(x[2], z[1, 2]))
    torch.testing.assert_close(net(x.expand(4, 2, *x.shape), z), y.expand(4, *y.shape))
    jacobian = torch.autograd.functional.jacobian(lambda v: net(x[0], v), z[0, 0])
    assert bool((jacobian.reshape(-1, 2) != 0).any(1).all())
    y.square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None, key
        assert bool((p.grad != 0).any()) or name == "MADE of one", key


def test_pixels_are_read_row_by_row_and_colours_within() -> None:
    order = pixel_cnn((3, 2, 2), 1).order
    assert order.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_a_network_that_looks_ahead_is_found() -> None:
    x, z, order = torch.rand(4), torch.rand(2), torch.arange(4)
    looks = [lambda x, z: x, lambda x, z: x.flip(-1), lambda x, z: torch.cat([0 * x, x.cumsum(-1)])]
    assert not any(nn.sees_only_the_past(net, order, x, z) for net in looks)
    assert nn.sees_only_the_past(lambda x, z: torch.cat([x.cumsum(-1) - x, 0 * x]), order, x, z)


def test_gated_layer_is_a_product() -> None:
    layer, x = nn.Gated(3, 2), torch.randn(5, 3)
    expected = layer.value(x) / (1 + torch.exp(-layer.gate(x)))
    torch.testing.assert_close(layer(x), expected)


def test_residual_network_at_zero_is_what_it_is_without_its_blocks() -> None:
    torch.manual_seed(0)
    x, block = torch.randn(2, 3, 4, 4), nn.Residual(3, torch.nn.ELU)
    with torch.no_grad():
        block.change[-1].weight.zero_()
        block.change[-1].bias.zero_()
    torch.testing.assert_close(block(x), x)
    with torch.no_grad():
        block.change[-1].bias.fill_(2.0)
    torch.testing.assert_close(block(x), x + 2)


def test_missing_takes_gaps_and_tells_them_from_zeros() -> None:
    net = nn.Missing(nn.mlp(8, 3))
    x = torch.tensor([1.0, math.nan, 0.0, math.nan], requires_grad=True)
    y = net(x)
    assert bool(torch.isfinite(y).all())
    assert not torch.allclose(y, net(x.nan_to_num()))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (gradient != 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.mlp(4, 6),
        lambda: nn.conv_decoder(4, (6, 8, 8), channels=(2, 3), hidden=4),
        lambda: nn.residual_decoder(4, (6, 4, 4), channels=(2,), hidden=4),
    ],
)
def test_output_bias_is_that_of_the_last_layer(make: Callable[[], torch.nn.Module]) -> None:
    net = make()
    before, value = net(torch.zeros(1, 4)), torch.arange(6.0)
    nn.set_output_bias(net, value)
    after = net(torch.zeros(1, 4))
    torch.testing.assert_close(after - before, value.reshape(1, 6, *(1,) * (after.dim() - 2)).expand(after.shape))


def test_output_bias_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="expected 6 numbers"):
        nn.set_output_bias(nn.mlp(4, 6), torch.zeros(5))
    with pytest.raises(ValueError, match="found none"):
        nn.set_output_bias(torch.nn.Identity(), torch.zeros(5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.conv_encoder((1, 30, 28), 5), "divisible by 4, for 2 halvings"),
        (lambda: nn.conv_decoder(5, (1, 32, 36), channels=(2, 2, 2)), "divisible by 8"),
        (lambda: nn.residual_encoder((1, 28, 28), 5, channels=()), "channels"),
        (lambda: nn.MaskedConv2d(1, 1, 4, colours=1, itself=True), "odd"),
        (lambda: nn.MADE(3, 2, order=torch.tensor([0, 1, 1])), "order"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_beside_puts_features_at_the_end_and_broadcasts():
    given = nn.ConcatContext(torch.nn.Identity())
    x, c = torch.randn(5, 1, 3, 2), torch.randn(4, 3, 6)  # particles of either, as with enumerated classes
    out = given(x, context=c)
    assert out.shape == (5, 4, 3, 8)
    assert torch.equal(out[2, 3, 1], torch.cat([x[2, 0, 1], c[3, 1]]))
    beside_channels = nn.ConcatContext(torch.nn.Identity(), of=nn.Labels(3), event_dim=3)
    images = beside_channels(torch.zeros(2, 1, 4, 4), context=torch.tensor([2, 0]))
    assert images.shape == (2, 4, 4, 4)
    assert bool((images[0, 3] == 1).all() and (images[1, 1] == 1).all() and images.sum() == 32)


def test_rows_are_taken_by_number():
    table = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(nn.rows_of(table, torch.tensor([[-1, 1]]), "x", first=-1), table[[0, 2]][None])
