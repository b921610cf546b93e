"""`ppvae generate RUN`: samples, reconstructions, interpolations and traversals, as pictures and arrays."""

from ppvae import report
from ppvae.cli.common import load_trained, parse_run, run_data
from ppvae.cli.options import Generate


def run(args: list[str]) -> int:
    """Writes the files into the run folder, and prints their paths; returns the exit status."""
    settings, directory = parse_run("generate", args, Generate)
    trained = load_trained(directory, settings)
    columns = run_data(trained, settings, "test")
    for path in report.write_generated(trained, columns, directory, count=settings.count, seed=settings.seed):
        print(path)
    return 0
