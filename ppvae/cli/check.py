"""`ppvae check PAIR`: checks a pair against the contract and describes it."""

import torch

from ppvae.cli.common import by_argument, load_splits, num_labels, parse_pair, print_columns, with_columns
from ppvae.cli.options import Data
from ppvae.data.loader import read_rows
from ppvae.errors import PpvaeError
from ppvae.factories import pairs
from ppvae.training import check

ROWS = 100  # of the data, on which the pair is checked


def run(args: list[str]) -> int:
    """Prints the description of a pair; returns the exit status."""
    _, factory, settings, arguments = parse_pair("check", args, Data)
    splits = load_splits(settings)
    print_columns(splits[0])
    torch.manual_seed(0)
    columns = with_columns(splits[0], settings)
    model, guide = pairs.build(factory, arguments, splits[0], num_labels(splits[0], settings.labels), splits[0].kinds)
    columns = by_argument(columns, model, guide)
    cpu = torch.device("cpu")
    first = torch.arange(min(ROWS, len(columns[0])))
    try:
        text = check(model, guide, tuple(read_rows(c, first, cpu) for c in columns))
    except PpvaeError as error:
        if len(columns[0]) <= ROWS:
            raise
        try:  # a pair whose plate draws its own subsample needs all data
            text = check(model, guide, tuple(read_rows(c, None, cpu) for c in columns))
        except PpvaeError:
            raise error from error.__cause__
    print(text)
    return 0
