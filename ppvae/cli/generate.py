"""`ppvae generate RUN`: samples, reconstructions, interpolations and traversals, as pictures and arrays."""

from ppvae import report
from ppvae.cli.common import load_trained, parse_run, run_data
from ppvae.cli.options import Generate


def run(args: list[str]) -> int:
    """Writes the files into the run folder, and prints their paths; returns the exit status, 1 where there are none."""
    settings, directory = parse_run("generate", args, Generate)
    trained = load_trained(directory, settings)
    columns = run_data(trained, settings, "test")
    paths = report.write_generated(trained, columns, directory, count=settings.count, seed=settings.seed)
    for path in paths:
        print(path)
    return 0 if paths else 1
