"""Guides for any model: annealed ones, and one posterior over several latents jointly."""
