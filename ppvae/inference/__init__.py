"""Pairs as terms: the contract, per-site log-densities, parameter scopes, and a drop-in for Pyro's SVI."""

from ppvae.inference.contract import Structure, check, inspect
from ppvae.inference.weights import Site, Terms, simulate, terms

__all__ = ["Site", "Structure", "Terms", "check", "inspect", "simulate", "terms"]
