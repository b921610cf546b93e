"""Samples from the model, and reconstructions of data: of the first observed site, or of all."""

from typing import Any

from torch import Tensor

from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers
from ppvae.generate.pair import open_pair
from ppvae.inference.tracing import Program


@explain_call
def samples(model: Program, guide: Program, x: Any, count: int = 64, *, mean: bool = True, seed: int = 0) -> Tensor:
    """Ancestral samples from the model, [count, *event]: z ~ p(z), then the mean of (or a draw from) p(x | z).

    `x` gives the shape of the data and the covariates of the model. The samples are those of the site that observes the
    data's first tensor; `prior_predictive` gives every observed site.

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> samples(pair.model, pair.guide, torch.zeros(4, 3), count=5).shape
    torch.Size([5, 3])
    """
    check_numbers(count=count, seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        return pair.decode({}, pair.repeat_rows(count), mean)


@explain_call
def reconstructions(model: Program, guide: Program, x: Any, *, mean: bool = True, seed: int = 0) -> Tensor:
    """Each datum encoded and decoded, [N, *event]: z ~ q(z | x), then the mean of (or a draw from) p(x | z).

    Of the site that observes the data's first tensor; `posterior_predictive` gives every observed site.

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> reconstructions(pair.model, pair.guide, torch.zeros(4, 3)).shape
    torch.Size([4, 3])
    """
    check_numbers(seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        return pair.decode(pair.encode(mean=False), pair.batch, mean)


@explain_call
def prior_predictive(
    model: Program, guide: Program, x: Any, count: int = 64, *, mean: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Ancestral samples of every observed site by its name, [count, *event] each: z ~ p(z), x ~ p(x | z).

    What `pyro.infer.Predictive(model, num_samples=count)` gives of the observed sites, for any number of rows. `x`
    gives the shapes of the data and the covariates of the model, such as lengths: draw i has those of row i modulo N.
    Masks are not applied: values beyond a sequence's length are of no meaning. With `mean=True`, means of p(x | z).

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> {name: x.shape for name, x in prior_predictive(pair.model, pair.guide, torch.zeros(4, 3), count=5).items()}
    {'x': torch.Size([5, 3])}
    """
    check_numbers(count=count, seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        return pair.decode_sites({}, pair.repeat_rows(count), mean)


@explain_call
def posterior_predictive(
    model: Program, guide: Program, x: Any, *, mean: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """A replicate of every observed site by its name, [N, *event] each: z ~ q(z | x), x ~ p(x | z).

    What `pyro.infer.Predictive(model, guide=guide)` gives of the observed sites, one draw of each datum. The guide
    stands for the posterior; `evaluation.predictive_check(..., keep_data=True)` weights its draws. Masks are
    not applied, as in `prior_predictive`. With `mean=True`, means of p(x | z).

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> posterior_predictive(pair.model, pair.guide, torch.zeros(4, 3))["x"].shape
    torch.Size([4, 3])
    """
    check_numbers(seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        return pair.decode_sites(pair.encode(mean=False), pair.batch, mean)
