"""The densities of a pair on a block of data in unconstrained coordinates, with their gradients.

`UnconstrainedSpace` maps the latents of a block to states in R^dims, `Potential` gives log q(z | x) and log p(x, z) of
a state, and `CompiledPotential` computes them by a compiled graph. Annealing, quadrature and fitted proposals use them.
"""
