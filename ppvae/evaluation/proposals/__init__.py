"""Proposals of importance sampling: the guide as it is, or densities that are fitted to each datum.

`fit_proposal` fits, for each datum of a block and with draws of its own, a Laplace approximation and a full-rank
density in unconstrained coordinates, and keeps the best candidate, the guide among them. `GuideProposal` and
`RefinedProposal` give the log-weights of fresh draws, which `ppvae.evaluation.importance` accumulates.
"""
