"""Annealed importance sampling: log p(x) from chains between the guide (or prior) and p(x, z), and BDMC bounds.

`ais` and `bdmc` hold the public functions; `potential` gives log-densities and gradients in the unconstrained
`coordinates` of a block's latents, `hmc` the transitions, `chains` the forward and reverse runs.
"""
