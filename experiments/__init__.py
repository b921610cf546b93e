"""One script per table or figure: `python -m experiments.NAME`."""
