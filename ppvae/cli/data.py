"""`ppvae data NAME`: loads a data set and describes its splits."""

import dataclasses
import sys

from ppvae.cli.common import description, load_splits, print_columns
from ppvae.cli.flags import parse
from ppvae.cli.option_checks import check_data
from ppvae.cli.options import Data, DataSet
from ppvae.errors import count_of

SHOWN = 6  # columns beside the data


def run(args: list[str]) -> int:
    """Prints a line for each split; returns the exit status."""
    if not args or args[0].startswith("-"):
        args = ["digits", *args]
    settings, _ = parse(DataSet, args[1:], f"ppvae data {args[0]}", description(DataSet))
    check_data(settings, args[0])
    splits = load_splits(Data(data=args[0], **dataclasses.asdict(settings)))
    print_columns(splits[0])
    for split in splits:
        labels = "" if split.labels is None else f", {count_of(len(split.labels.unique()), 'label')}"
        shown = [f", {name} {list(column.shape)}" for name, column in split.attributes.items()]
        columns = "".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")
        shapes = f"{list(split.shape)}, event {list(split.event_shape)}"
        print(f"{split.description}: {shapes}{labels}{columns}, sha256 {split.digest[:16]}")
    info = splits[0].info
    if not (info.binarize or info.dequantize or info.kinds) and (info.levels or 0) > 2:
        print(
            f"log p(x) of {info.levels} levels: take a likelihood of levels, as DiscretizedLogistic; or pass "
            f"--dequantize, for a density that bounds it, or --binarize fixed, for bits",
            file=sys.stderr,
        )
    return 0
