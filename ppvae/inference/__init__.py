"""Pairs as terms: the contract, per-site log-densities, parameter scopes, and a drop-in for Pyro's SVI."""

from ppvae.inference.inspection import check, inspect
from ppvae.inference.sites import Site
from ppvae.inference.structure import Structure
from ppvae.inference.svi import SVI
from ppvae.inference.terms import Terms, simulate, terms

__all__ = ["SVI", "Site", "Structure", "Terms", "check", "inspect", "simulate", "terms"]
