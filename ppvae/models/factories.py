"""Factories of pairs for the command line, whose flags are derived from their signatures."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from torch import Tensor
from torch.nn import Embedding, Flatten, Identity, Module, Sequential

from ppvae import likelihoods, nn, posteriors, priors
from ppvae.errors import UsageError
from ppvae.errors.ranges import SEED, check_numbers, check_ranges, check_sequences
from ppvae.factories.constructor_flags import ClassChoice, accepted_arguments
from ppvae.factories.pairs import trained_with
from ppvae.likelihoods.tabular import ColumnSpec, parse_columns
from ppvae.models.gaussian_mixture import GaussianMixture
from ppvae.models.linear_gaussian import LinearGaussian
from ppvae.models.vae import VAE
from ppvae.nn.context import call_with_context

Part = Callable[..., Module]
Prior = Annotated[Part, ClassChoice(("ppvae.priors",), Module, ("latent", "posterior", "data", "num_labels"))]
Likelihood = Annotated[
    Part, ClassChoice(("ppvae.likelihoods",), Module, ("net", "masked", "latent", "data", "columns", "num_labels"))
]
Posterior = Annotated[
    Part,
    ClassChoice(
        ("ppvae.posteriors",), Module, ("net", "latent", "data", "prior", "likelihood", "num_labels", "size", "outputs")
    ),
]
Decoder = Callable[[int, tuple[int, ...]], Module]  # of the size of z and the event shape of the output
Pair = VAE | tuple[Callable[..., Any], Callable[..., Any]]


def vae(
    train: Tensor,
    latent: int = 8,
    hidden: tuple[int, ...] = (200, 200),
    prior: Prior = priors.StandardNormal,
    likelihood: Likelihood = likelihoods.Bernoulli,
    posterior: Posterior = posteriors.DiagonalNormal,
    enumerate: bool = False,
    missing: bool = False,
    num_labels: int | None = None,
    columns: ColumnSpec | None = None,
) -> Pair:
    """A VAE on flat data, its encoder and decoder multilayer perceptrons.

    By default, for binary data: standard normal prior, Bernoulli likelihood, diagonal normal posterior. The decoder
    mirrors the encoder and starts at the mean image, as in Burda et al. 2016 (arXiv 1509.00519).

    Args:
        train: the training data [N, features].
        latent: the size of z.
        hidden: the widths of the encoder's hidden layers.
        prior: p(z), a class of ppvae.priors or a function of its arguments.
        likelihood: p(x | z), a class of ppvae.likelihoods; one of your own takes `net`, a network of z (its
            `output_shape(event)` is the shape of the outputs, that of a datum by default), or `latent`.
        posterior: q(z | x), a class of ppvae.posteriors; one of your own takes `net`, a network of x with
            `outputs(latent)` outputs, or `data` and `latent`.
        enumerate: sum a discrete z out exactly; takes an objective that does, as TraceEnum_ELBO.
        missing: whether data may be missing (NaN).
        num_labels: how many labels there are, where the batch's second tensor is one.
        columns: the kinds of the columns of a table, for `Mixed`; `table_vae` also standardises real ones.

    Raises `UsageError`, by name, for parts that cannot be built from these arguments.

    >>> from functools import partial
    >>> prior = partial(priors.VampPrior.from_data, components=20)
    >>> pair = vae(torch.rand(50, 64), prior=prior, posterior=posteriors.IAF)
    >>> pair.prior.pseudo_inputs.shape
    torch.Size([20, 64])
    """
    check_numbers(latent=latent)
    check_sequences(hidden=hidden)
    check_ranges(num_labels=num_labels)
    if columns is not None:
        parse_columns(columns)
    features = train.shape[1:].numel()
    if train.dim() != 2:
        raise UsageError(
            f"train: expected flat data [N, features], found {list(train.shape)}; use conv_vae, or load flat"
        )

    def encoder(outputs: int) -> Module:
        if missing:
            return nn.Missing(nn.mlp(2 * features, outputs, hidden=hidden))
        return nn.mlp(features, outputs, hidden=hidden)

    def decoder(inputs: int, shape: tuple[int, ...]) -> Module:
        return nn.mlp(inputs, shape[0], hidden=hidden[::-1])

    def masked(inputs: int, shape: tuple[int, ...]) -> Module:
        return nn.MADE(features, inputs, shape[0] // features, hidden=hidden[::-1])

    module = _build_vae(train, latent, prior, likelihood, posterior, num_labels, columns, encoder, decoder, masked)
    if hasattr(module.likelihood, "output_for_mean"):
        mean = train.double().nanmean(0).nan_to_num(0.5)
        likelihood_: Any = module.likelihood
        nn.set_output_bias(likelihood_.net, likelihood_.output_for_mean(mean))
    return _with_enumeration(module) if enumerate else module


def conv_vae(
    train: Tensor,
    latent: int = 16,
    channels: tuple[int, int] = (32, 64),
    hidden: int = 256,
    prior: Prior = priors.StandardNormal,
    likelihood: Likelihood = likelihoods.Bernoulli,
    posterior: Posterior = posteriors.DiagonalNormal,
    enumerate: bool = False,
    num_labels: int | None = None,
) -> Pair:
    """A convolutional VAE on images [N, C, H, W] whose sides divide by 4, by default binary ones.

    Args:
        train: the training data.
        latent: the size of z.
        channels: of the encoder's two convolutions; the decoder mirrors them.
        hidden: the width of the dense layer between convolutions and z.
        prior: p(z), a class of ppvae.priors or a function of its arguments.
        likelihood: p(x | z), a class of ppvae.likelihoods.
        posterior: q(z | x), a class of ppvae.posteriors.
        enumerate: sum a discrete z out exactly; takes an objective that does, as TraceEnum_ELBO.
        num_labels: how many labels there are, where the batch's second tensor is one.

    Raises `UsageError`, by name, for parts that cannot be built from these arguments.
    """
    check_numbers(latent=latent, hidden=hidden)
    check_sequences(channels=channels)
    check_ranges(num_labels=num_labels)
    if train.dim() != 4:
        raise UsageError(f"conv_vae: expected images [N, C, H, W], found {list(train.shape)}; load with flat=False")
    event = tuple(train.shape[1:])

    def encoder(outputs: int) -> Module:
        return nn.conv_encoder(event, outputs, channels=channels, hidden=hidden)

    def decoder(inputs: int, shape: tuple[int, ...]) -> Module:
        return nn.conv_decoder(inputs, shape, channels=channels[::-1], hidden=hidden)

    def masked(inputs: int, shape: tuple[int, ...]) -> Module:
        features = channels[0]
        return nn.PixelCNN(event, decoder(inputs, (features, *event[1:])), features, shape[0] // event[0])

    module = _build_vae(train, latent, prior, likelihood, posterior, num_labels, None, encoder, decoder, masked)
    return _with_enumeration(module) if enumerate else module


@dataclass(frozen=True)
class _Unavailable:
    """An argument of a part that the factory cannot provide; `what` describes it for messages."""

    what: str


def _build_vae(
    train: Tensor,
    latent: int,
    prior: Part,
    likelihood: Part,
    posterior: Part,
    num_labels: int | None,
    columns: ColumnSpec | None,
    encoder: Callable[[int], Module],
    decoder: Decoder,
    masked: Decoder,
) -> VAE:
    """Builds a VAE of parts: arguments by the names in their constructors, networks by the sizes that they report.

    The size of z is that of the prior, which is given `latent` if it takes it.
    """
    index = _Unavailable(
        "expected the index of each datum with it (data.indexed), which a factory of your own can bring"
    )
    labels = _Unavailable("expected the label of each datum with it: pass --labels, or num_labels")
    kinds = _Unavailable(
        "its argument 'columns' cannot be given on the command line but by a table (.csv, .parquet); make the part in "
        "Python, in a factory of your own"
    )
    available: dict[str, Any] = {
        "latent": latent, "data": train, "num_labels": labels if num_labels is None else num_labels,
        "columns": columns or kinds, "net": Identity(), "masked": Identity(), "size": index, "outputs": index,
    }  # fmt: skip

    def encoded(size: int) -> Module:
        module: Any = build_part("posterior", posterior, available | {"latent": size})
        if not accepted_arguments(posterior, {"net": None}):
            return module  # a part with a network of its own
        if not hasattr(module, "outputs"):
            raise UsageError(
                f"posterior {_part_name(posterior)}: expected a method outputs(latent), the number of its network's "
                f"outputs, for the argument net; found none"
            )
        try:
            module.net = encoder(module.outputs(size))
        except ValueError as error:
            raise UsageError(f"posterior {_part_name(posterior)}: {error}") from error
        return module

    if accepted_arguments(prior, {"posterior": None}):
        if accepted_arguments(posterior, {"prior": None}):
            raise UsageError(
                f"prior {_part_name(prior)} is made of the posterior, and posterior {_part_name(posterior)} of the "
                f"prior: expected one of them to stand by itself; choose another prior or posterior"
            )
        available["posterior"] = encoded(latent)
    available["prior"] = build_part("prior", prior, available)
    context = None if num_labels is None else torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        z = call_with_context(available["prior"], context=context)
    size = z.event_shape.numel()
    likelihood_: Any = build_part("likelihood", likelihood, available | {"latent": size})
    available["likelihood"], event = likelihood_, tuple(train.shape[1:])
    shape = likelihood_.output_shape(event) if hasattr(likelihood_, "output_shape") else event
    classes = _number_of_classes(z.support)
    takes_masked = bool(accepted_arguments(likelihood, {"masked": None}))
    if classes and takes_masked:
        raise UsageError(
            f"likelihood {_part_name(likelihood)}: expected z in floating point, found classes; try prior OneHot"
        )
    if classes:  # learned embeddings of size `classes`
        net: Module = Sequential(Embedding(classes, classes), Flatten(-2), decoder(size * classes, shape))
    else:
        net = masked(size, shape) if takes_masked else decoder(size, shape)
    if takes_masked or accepted_arguments(likelihood, {"net": None}):
        likelihood_.net = net
    if "posterior" not in available:
        available["posterior"] = encoded(size)
    return VAE(available["prior"], available["likelihood"], available["posterior"])


def build_part(role: str, part: Part, available: Mapping[str, Any]) -> Module:
    """A part from those of the available arguments that it accepts; UsageError, by role and name, where it fails."""
    arguments = accepted_arguments(part, available)
    unavailable = next((v.what for v in arguments.values() if isinstance(v, _Unavailable)), "")
    if unavailable:
        raise UsageError(f"{role} {_part_name(part)}: {unavailable}")
    try:
        module = part(**arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{role} {_part_name(part)}: {error}") from error
    declared = inspect.signature(module.forward).parameters.get("context")
    if declared is not None and declared.default is declared.empty and "num_labels" not in arguments:
        raise UsageError(
            f"{role} {_part_name(part)}: expected a second tensor with each datum that is not its label (its docstring "
            f"says what), which a factory of your own can bring"
        )
    return module


def _number_of_classes(support: Any) -> int:
    """The number of classes of the integer elements of z; 0 where z is not a vector of classes."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return int(support.upper_bound) + 1 if isinstance(support, constraints.integer_interval) else 0


def _part_name(part: Part) -> str:
    function = part.func if isinstance(part, partial) else part
    return getattr(function, "__qualname__", type(function).__name__)


def _with_enumeration(module: VAE) -> Pair:
    return module.model, config_enumerate(module.guide)


def linear_gaussian(train: Tensor, latent: int = 2, scale: float = 1.0) -> LinearGaussian:
    """Probabilistic PCA with its exact posterior as guide, on flat real data [N, features].

    Args:
        train: the training data.
        latent: the size of z.
        scale: the starting noise scale.
    """
    check_numbers(latent=latent)
    check_ranges(scale=scale)
    return _linear_gaussian("linear_gaussian", train, latent, scale)


def factor_analysis(train: Tensor, latent: int = 2) -> LinearGaussian:
    """Factor analysis with its exact posterior as guide, on flat real data [N, features].

    Args:
        train: the training data.
        latent: the size of z.
    """
    check_numbers(latent=latent)
    return _linear_gaussian("factor_analysis", train, latent)


def _linear_gaussian(name: str, train: Tensor, latent: int, scale: float | None = None) -> LinearGaussian:
    features = _number_of_features(name, train)
    pair = LinearGaussian(features, latent, train.std(0).clamp(min=1e-3) if scale is None else scale)
    with torch.no_grad():
        pair.loc.copy_(train.mean(0))
    return pair


@trained_with("ELBO")
def gaussian_mixture(train: Tensor, components: int = 10, rank: int | None = None, start: int = 0) -> GaussianMixture:
    """A mixture of normals, its cluster summed out, on flat real data [N, features].

    Args:
        train: the training data.
        components: the number of clusters.
        rank: None for any covariance, 0 for a diagonal one, r for a mixture of factor analysers.
        start: the seed of the rows that the clusters start at.
    """
    check_numbers(components=components)
    check_ranges(rank=rank)
    SEED.check_number("start", start)
    _number_of_features("gaussian_mixture", train)
    return GaussianMixture.from_data(train, components, rank, start)


def _number_of_features(name: str, train: Tensor) -> int:
    if train.dim() != 2:
        raise UsageError(f"{name}: expected flat data [N, features], found {list(train.shape)}")
    return train.shape[1]
