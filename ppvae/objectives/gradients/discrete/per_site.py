"""A gradient estimator for each site."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from ppvae.errors import UsageError, site_error
from ppvae.inference.sites import graph_leaves
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.gradients.discrete.sites import SiteEstimator, check_sites, sites_surrogate
from ppvae.objectives.gradients.dreg import DReG
from ppvae.objectives.gradients.estimator import GradientEstimator, gradient_only
from ppvae.objectives.gradients.latent_leaves import LatentLeaves
from ppvae.objectives.gradients.pathwise import STL, Pathwise
from ppvae.objectives.gradients.score_function import ScoreFunction
from ppvae.objectives.protocol import LogWeightBound, PairCall


@final
class PerSite(GradientEstimator):
    """Estimators by site: `gradient={"y": "arms", "z": "dreg"}`.

    Every site without a reparameterised sample is named. Reparameterised sites share one of "pathwise" (that of sites
    which are not named), "stl" and "dreg"; the last two omit or reparameterise the score of these sites alone.

    Args:
        estimators: by the name of the site.

    Raises:
        UsageError: reparameterised sites with estimators that differ.
        ContractError: a name that is no latent of the guide; a site and an estimator that do not fit.

    >>> from ppvae.objectives import IWAE
    >>> IWAE(5, gradient={"y": "arms", "z": "dreg"}).gradient
    PerSite({'y': ARMS(4), 'z': DReG()})
    """

    holds_latents = False

    def __init__(self, estimators: Mapping[str, GradientEstimator]):
        self.estimators = dict(estimators)
        found = {repr(e): e for e in self.estimators.values() if not isinstance(e, SiteEstimator | ScoreFunction)}
        if len(found) > 1 or not all(isinstance(e, Pathwise | STL | DReG) for e in found.values()):
            raise UsageError(
                "gradient: expected one of 'pathwise', 'stl' and 'dreg' for all reparameterised sites, found "
                f"{', '.join(found)}"
            )
        self.paths: GradientEstimator = next(iter(found.values()), Pathwise())

    @property
    def has_learned_baseline(self) -> bool:
        return any(e.has_learned_baseline for e in self.estimators.values())

    def check_objective(self, objective: LogWeightBound) -> None:
        for estimator in self.estimators.values():
            estimator.check_objective(objective)

    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        check_sites(self, s, "gradients by site")
        for name, estimator in self.estimators.items():
            if name not in s.guide_roles:
                raise site_error(
                    name, "a latent of the guide, to give it a gradient of its own", "none of this name",
                    f"name one of {', '.join(s.guide_roles)}",
                )  # fmt: skip
            if (name in s.non_reparameterized) != isinstance(estimator, SiteEstimator | ScoreFunction):
                found = "one without" if name in s.non_reparameterized else "a reparameterised one"
                cure = "'arms' or 'vimco'" if name in s.non_reparameterized else "'pathwise' or 'dreg'"
                wanted = "a latent with" if name in s.non_reparameterized else "a latent without"
                raise site_error(
                    name, f"{wanted} a reparameterised sample, for {estimator!r}", found, f"give it {cure}"
                )
        for name in s.non_reparameterized:
            if name not in self.estimators:
                raise site_error(
                    name, "an estimator for every latent without a reparameterised sample", "none",
                    f"add one, as gradient={{{name!r}: 'arms'}}",
                )  # fmt: skip

    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        s, pathwise = call.structure, isinstance(self.paths, Pathwise)
        needs_values = any(getattr(e, "needs_values", False) for e in self.estimators.values())
        if pathwise:
            hook = LatentLeaves(s.non_reparameterized) if needs_values else None
            t = call.terms(latent_hook=hook) if hook is not None else call.terms()
            bound = objective.bound(t).sum()
            own = bound
        else:
            hook = LatentLeaves()
            t = call.terms(latent_hook=hook)
            bound = objective.bound(t).sum()
            own = self._reparameterized_score(objective, t, hook, bound)
        sites = sites_surrogate(objective, call, t, self.estimators.__getitem__, hook, paths=pathwise)
        return bound.detach() + gradient_only(own + sites)

    def _reparameterized_score(
        self, objective: LogWeightBound, t: Terms, leaves: LatentLeaves, bound: Tensor
    ) -> Tensor:
        """The bound with STL or DReG for the sites with a path: their densities are held, and their paths weighted."""
        log_weight, free = objective.log_weights(t), t.structure.non_reparameterized
        with_path = [site for name, site in t.guide.items() if name not in free]
        for name in free:
            self._check_order(name, t, leaves)
        held = [site.log_prob for site in with_path if site.log_prob.requires_grad]
        if held:
            scores = torch.autograd.grad(bound, held, retain_graph=True, allow_unused=True, materialize_grads=True)
            bound = bound - sum((c * q).sum() for c, q in zip(scores, held, strict=True))
        detached = log_weight.detach().requires_grad_()
        (r,) = torch.autograd.grad(objective.reduce(detached).sum(), detached)
        if isinstance(self.paths, DReG):
            r = r * objective.dreg_weights(detached.detach())
        return bound + leaves.path_surrogate(leaves.gradients(log_weight), r)

    def _check_order(self, name: str, t: Terms, leaves: LatentLeaves) -> None:
        found = {id(leaf) for leaf in graph_leaves(t.guide[name].log_prob)}
        for (earlier, _), (value, leaf, _) in leaves.entries.items():
            if value.requires_grad and id(leaf) in found:
                raise site_error(
                    name, f"a latent that the guide samples before the reparameterised ones, for {self.paths!r}",
                    f"one that depends on {earlier!r}", f"give {earlier!r} 'pathwise'",
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        states = {name: estimator.state_dict() for name, estimator in self.estimators.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, estimator in self.estimators.items():
            estimator.load_state_dict(state.get(name, {}))

    def __repr__(self) -> str:
        return f"PerSite({self.estimators!r})"
