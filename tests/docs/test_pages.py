"""Every code block of the documentation runs, and prints what the page shows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
import torch

from tests.docs import blocks

LANGUAGES = {"python", "bash", "console", "text", "toml", "json", ""}


def parameters() -> list[object]:
    """The pages with code that runs; expensive ones are marked slow."""
    found = []
    for page in blocks.pages():
        if any(b.language in ("python", "bash", "console") for b in blocks.blocks(page.read_text())):
            marks = [pytest.mark.slow] if blocks.is_slow(page) else []
            found.append(pytest.param(page, id=str(page.relative_to(blocks.ROOT)), marks=marks))
    return found


@pytest.mark.parametrize("page", parameters())
def test_a_page_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    matplotlib.use("Agg")
    before = torch.get_default_dtype()
    blocks.reset()
    try:
        for block, printed, shown in blocks.run(page):
            if shown is not None:
                assert blocks.same(printed, shown.text), f"{block.text}\nprinted:\n{printed}\nshown:\n{shown.text}"
    finally:
        torch.set_default_dtype(before)


def test_every_block_has_a_known_language_and_every_output_a_block() -> None:
    for page in blocks.pages():
        found = blocks.blocks(page.read_text())
        assert {b.language for b in found} <= LANGUAGES, page
        for block, after in pairwise(found):
            if after.title == "Output":
                assert blocks.shown(page, block, after) is after, f"{page}: an output without its block"


def test_outputs_are_compared_by_words_and_by_numbers() -> None:
    assert blocks.same("log p(x) -22.31, 3 of 40 (1.2 s)", "log p(x) -22.30, 3 of 40 (9 s)")
    assert not blocks.same("log p(x) -22.31", "log p(x) 22.31")
    assert not blocks.same("log p(x) -22.31", "log q(x) -22.31")
    assert not blocks.same("3 of 40", "5 of 40")


def test_a_command_that_is_not_run_must_have_its_flags() -> None:
    blocks.check_commands("ppvae fit ppvae.models:vae --latent 4 --prior MAF --prior.transforms 2  # a flow\n")
    with pytest.raises(ValueError, match="--laten"):
        blocks.check_commands("ppvae fit ppvae.models:vae --laten 4\n")
