"""Factories of model/guide pairs: functions that the command line and `ppvae.load` call by name.

A factory takes numbers, words and choices of classes, and returns (model, guide) or something with `.model` and
`.guide`. `pairs` finds it in a module or file, builds its pair and rebuilds that of a run; `constructor_flags` reads
arguments from signatures and docstrings, and lets one name a class. Priors, likelihoods and posteriors are swapped that
way.
"""
