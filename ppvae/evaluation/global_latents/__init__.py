"""Evaluation of pairs with global latents, given draws of these from the guide.

`draws` are draws of the global latents, the same for every block of data; `likelihood` is log p(x_n | theta) of a block
at each of them, local latents integrated out; `evidence` log p of all data and of new data from it; `cross_validation`
leave-one-out, K-fold and WAIC.
"""
