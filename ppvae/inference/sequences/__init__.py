"""Pairs whose latents are sequences: log-weights by step, runs that continue others, and particle filters."""
