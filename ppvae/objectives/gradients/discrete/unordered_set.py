"""Draws without replacement of a discrete site with few joint values: the unordered set estimator."""

import itertools
import math
from typing import final

import torch
from torch import Tensor

from ppvae.errors import UsageError, site_error
from ppvae.errors.ranges import check_numbers
from ppvae.objectives.gradients.discrete.bits import family_of, finite, log_probs_of, value_of_index
from ppvae.objectives.gradients.discrete.sites import SiteDraws, SiteEstimator

MAX_VALUES = 1024  # joint values of a site for one datum
TINY = 1e-30  # the least probability of a draw: that of a set, a product of up to eight, stays positive


@final
class UnorderedSet(SiteEstimator):
    """n draws without replacement, the first of which is the guide's own; unbiased.

    sum_{s in S} d q(s) R(S, s) (f(s) - sum_{s' in S} q(s') R_s(S, s') f(s')), with R(S, s) = P(S without s | s is not
    drawn) / P(S), R_s the same without s among the values, and f(s) the bound with draw k replaced by s; d q(s) for all
    elements of the site jointly. Where n is the number of joint values it is the exact gradient through the site, given
    earlier sites. A step evaluates n K draws of the pair for one site, and (n - 1) K more for every further one.

    Args:
        draws: n, at least 2; fewer where the site has fewer joint values.

    Raises:
        ContractError: a site that is neither Bernoulli nor categorical, that has a mask, or more than 1024 joint values
            for a datum, by its name.

    Source: Kool et al. 2020 (arXiv 2002.06043), with the built-in baseline.

    >>> from ppvae import VAE, likelihoods, objectives, posteriors, priors
    >>> nets = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    >>> vae = VAE(priors.Bernoulli(2), likelihoods.Bernoulli(nets[0]), posteriors.Bernoulli(nets[1]))
    >>> loss = objectives.ELBO(2, gradient=UnorderedSet(3)).loss_and_grads(vae.model, vae.guide, torch.ones(4, 3))
    >>> nets[1].weight.grad.shape
    torch.Size([2, 3])
    """

    def __init__(self, draws: int = 4):
        check_numbers(draws=draws)
        if not 2 <= draws <= 8:
            raise UsageError(f"draws: expected 2 to 8 draws without replacement, found {draws}")
        self.draws = draws

    def site_surrogate(self, site: SiteDraws) -> Tensor:
        family = family_of(site, repr(self))
        columns = log_probs_of(site, family)  # [C, K, *inner plates, batch, *event]
        one_hot = columns.dim() == site.value.dim()
        event = site.event_dims - one_hot
        index = site.value.argmax(-1) if one_hot else site.value.long()
        data = index.dim() - event - 1
        rest = index.movedim(data, 1).shape  # [K, batch, *inner plates, *event]
        flat = index.movedim(data, 1).flatten(2) if len(rest) > 2 else index[..., None]
        count, elements = len(columns), flat.shape[-1]
        if site.site.mask is not None or count**elements > MAX_VALUES:
            found = "a mask" if site.site.mask is not None else f"{count}^{elements}"
            raise site_error(
                site.name, f"an unmasked latent with at most {MAX_VALUES} joint values per datum, for {self!r}", found,
                "take gradient='arms'",
            )  # fmt: skip
        table = torch.tensor(list(itertools.product(range(count), repeat=elements)), device=index.device)
        log_probs = columns.movedim(data + 1, 2).reshape(count, *rest[:2], elements).double()
        picked = [log_probs[table[:, e], ..., e] for e in range(elements)]
        joint = torch.stack(picked).sum(0)  # [values, K, batch], with gradients
        powers = count ** torch.arange(elements - 1, -1, -1, device=index.device)
        first = (flat * powers).sum(-1)[None]
        n = min(self.draws, len(table))
        uniform = torch.empty_like(joint).uniform_().clamp_min(torch.finfo(joint.dtype).tiny)
        keys = (finite(joint.detach()) - (-uniform.log()).log()).scatter(0, first, -math.inf)
        drawn = torch.cat([first, keys.topk(n - 1, 0).indices])  # [n, K, batch]
        values = table[drawn[1:]].reshape(n - 1, *rest).movedim(2, data + 1)
        further = value_of_index(values, family, count).to(site.value)
        log_q = joint.gather(0, drawn)
        impossible = log_q.detach() == -torch.inf  # drawn where there are fewer possible values than draws
        f = torch.where(impossible, 0.0, site.bounds(site.evaluate(further, from_guide=False)))
        weight = set_weights(log_q.detach().exp().clamp_min(TINY), f)
        return (weight * torch.where(impossible | (weight == 0), 0.0, log_q)).sum()

    def __repr__(self) -> str:
        return f"UnorderedSet({self.draws})"


def set_weights(q: Tensor, f: Tensor) -> Tensor:
    """q(s) R(S, s) (f(s) - baseline of s) of the draws s of a set, [n, K, batch], given q(s) and f(s)."""
    everything = frozenset(range(len(q)))
    of_set = _probability(q, everything, frozenset())
    out = []
    for s in everything:
        without = everything - {s}
        of_rest = _probability(q, without, frozenset({s}))
        baseline = q[s] * f[s]
        for other in without:
            ratio = _probability(q, without - {other}, frozenset({s, other})) / of_rest
            baseline = baseline + q[other] * ratio * f[other]
        out.append(torch.nan_to_num(q[s] * of_rest / of_set * (f[s] - baseline)))
    return torch.stack(out)


def _probability(q: Tensor, members: frozenset[int], removed: frozenset[int]) -> Tensor:
    """The probability that the first draws without replacement are a set, in any order, once others are removed."""
    left = 1 - sum((q[i] for i in removed), torch.zeros_like(q[0]))
    partial = {frozenset[int](): torch.ones_like(q[0])}
    for size in range(1, len(members) + 1):
        for subset in map(frozenset, itertools.combinations(sorted(members), size)):
            total = torch.zeros_like(q[0])
            for last in subset:
                before = subset - {last}
                mass = left - sum((q[i] for i in before), torch.zeros_like(q[0]))
                total = total + partial[before] * (q[last] / mass.clamp_min(1e-12)).clamp_max(1)
            partial[subset] = total
    return partial[members]
