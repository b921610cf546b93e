"""What pages say agrees with the package and with the files of results; links between sources exist."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import tomllib
from typing import Any

import pytest

from tests.docs.blocks import ROOT, pages

CATALOGUE = tomllib.loads((ROOT / "docs" / "catalogue" / "parts.toml").read_text())
RESULTS = ROOT / "experiments" / "results"


def trust(cell: str) -> dict[str, Any]:
    return json.loads((RESULTS / "trust" / f"{cell}.json").read_text())["result"]


def test_every_model_and_objective_is_in_the_catalogue() -> None:
    for room, other in (("models", {"Block"}), ("objectives", {"Objective"})):
        module = importlib.import_module(f"ppvae.{room}")
        classes = {n for n in module.__all__ if inspect.isclass(getattr(module, n)) or n == "VAE"}
        assert classes - other == set(CATALOGUE[room])


def test_every_part_says_when_to_use_it_and_its_formula() -> None:
    for room, parts in CATALOGUE.items():
        module = importlib.import_module(f"ppvae.{room}")
        for name, entry in parts.items():
            assert hasattr(module, name)
            assert len(entry["use"]) > 15, name
            assert entry["reference"]
            assert room == "nn" or len(entry["formula"]) > 10, name
            assert entry.get("formula", "").count("{") == entry.get("formula", "").count("}"), name


def test_the_readme_is_short_and_counts_right() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    counts = {room: int(n) for n, room in re.findall(r"(\d+) (priors|likelihoods|posteriors|models)", text)}
    assert counts == {room: len(CATALOGUE[room]) for room in counts}
    assert len(counts) == 4
    assert f"{len(CATALOGUE['objectives'])} bounds" in text


@pytest.mark.parametrize("place", ["README.md", "docs/index.md"])
def test_the_numbers_of_the_front_page_are_those_of_the_results(place: str) -> None:
    text = " ".join((ROOT / place).read_text().split())
    one, two = trust("1-VAE-1-0"), trust("2-VAE-1-0")
    assert one["guide_reliable"] == two["guide_reliable"] == 0
    assert f"it is {one['guide_below']:.2f} nats too low" in text
    assert f"layer and {two['guide_below']:.2f} for two" in text
    assert f"within {max(one['refined_below'], two['refined_below']):.2f} nats of annealing" in text
    cost = [r[f"{m}_seconds"] / r["guide_seconds"] for m in ("refined", "annealed") for r in (one, two)]
    assert "at {:.2f} and {:.2f} times the cost of L_5000 instead of {:.0f} and {:.0f} times".format(*cost) in text


def test_tables_of_pages_are_those_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "hooks" / "tables.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for place, make in tables.TABLES.items():
        assert (ROOT / place).read_text() == make(), f"python docs/hooks/tables.py writes {place}"


def test_links_between_sources_lead_to_files() -> None:
    made = ("results/pictures/", "results/reproduced.md", "tutorials/", "catalogue/", "project/", "reference/")
    for page in [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)\s#]+)", text):
            if "://" in link:
                continue
            target = (page.parent / link).resolve()
            generated = (ROOT / "docs") in target.parents and str(target.relative_to(ROOT / "docs")).startswith(made)
            assert generated or target.exists(), f"{page.relative_to(ROOT)}: {link}"


def test_pages_print_no_path_of_a_machine() -> None:
    for page in pages():
        assert not re.search(r"/(home|root|work|tmp|Users)/\w", page.read_text()), page
