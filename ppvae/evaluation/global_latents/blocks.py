"""Blocks of data of pairs with global latents: one of all data for joint weights, several for weights given them."""

from dataclasses import replace

from ppvae.errors import ContractError, UsageError
from ppvae.inference.structure import Structure

LOCAL_BLOCK = 500  # data in a block, given the global latents: a run for each of their draws is shared by many data


def joint_block(s: Structure, total: int, inspected: int) -> tuple[Structure, int]:
    """(structure, number of data in the one block of a joint weight).

    A plate that draws a subsample is then given all rows at once, as many as its weight counts.
    """
    if s.draws_subsample:
        return replace(s, subsample_size=s.full_size), total
    if s.full_size not in (total, inspected):
        raise ContractError(
            f"a latent is shared by all data, so that weights are joint: expected all {s.full_size} data of the plate "
            f"{s.plate!r}, found {total}. Pass the whole data set (ppvae evaluate --split train), or conditional=True "
            "(--conditional) for the predictive density of each datum"
        )
    return s, total


def local_blocks(s: Structure, total: int) -> tuple[Structure, int]:
    """(structure, number of data in a block) for weights of each datum given the global latents.

    One block holds all data where a density of the global latents depends on the rows of a batch.
    """
    if not s.has_global_latents:
        raise UsageError(
            "no latent is shared by all data, and each datum has a log p(x) of its own: leave out `conditional` and "
            "`local_particles`"
        )
    if s.local_refusal:
        raise ContractError(s.local_refusal)
    if s.draws_subsample:
        size = s.full_size if s.globals_read_rows else min(LOCAL_BLOCK, s.full_size)
        return replace(s, subsample_size=size), size
    return s, total if s.globals_read_rows else LOCAL_BLOCK
