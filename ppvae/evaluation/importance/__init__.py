"""Importance sampling of log p(x): allocation of particles, log-weights and their statistics, PSIS, posterior draws."""
