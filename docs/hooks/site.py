"""MkDocs hooks: pages made from the package, its notebooks and its results; formulas; the check of every link."""

import re
from pathlib import Path
from typing import Any

import catalogue
import drawing
import latex2mathml.converter
import links
import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import notebooks

ROOT = Path(__file__).parents[2]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
COPIES = {  # files of the repository that are pages too: where their links lead from there
    "project/contributing.md": ("CONTRIBUTING.md", {"docs/": "../", "CHANGELOG.md": "changelog.md"}),
    "project/changelog.md": ("CHANGELOG.md", {"docs/": "../"}),
    "results/reproduced.md": ("experiments/README.md", {"results/": "pictures/"}),
}
SECTIONS = {"tutorials": notebooks.pages, "catalogue": catalogue.pages, "reference": reference.pages}
GENERATED: dict[str, str | bytes] = {}


def on_config(config: MkDocsConfig) -> None:
    """Makes the pages, and puts their navigation where mkdocs.yml names their sections."""
    GENERATED.clear()
    for place, (source, moved) in COPIES.items():
        GENERATED[place] = _moved((ROOT / source).read_text(), moved)
    for picture in (ROOT / "experiments/results").glob("*/*.png"):
        GENERATED[f"results/pictures/{picture.parent.name}/{picture.name}"] = picture.read_bytes()
    GENERATED["project/architecture.svg"] = drawing.svg()
    config.nav = [_with_section(entry) for entry in config.nav or []]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated files."""
    for place, content in GENERATED.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    return FORMULA.sub(lambda m: _mathml(m[3], "inline" if m[2] == "(" else "block"), html)


def on_post_build(config: MkDocsConfig) -> None:
    """Raises where a link is dead or a page needs the network."""
    links.check(Path(config.site_dir))


def _with_section(entry: Any) -> Any:
    """{title: "section of tutorials"} is replaced by the pages of that section."""
    (title, value), *_ = entry.items()
    if isinstance(value, str) and value.startswith("section of "):
        pages, nav = SECTIONS[value.removeprefix("section of ")]()
        GENERATED.update(pages)
        return {title: nav}
    if isinstance(value, list):
        return {title: [_with_section(e) if isinstance(e, dict) else e for e in value]}
    return entry


def _moved(text: str, moved: dict[str, str]) -> str:
    for before, after in moved.items():
        text = text.replace(f"]({before}", f"]({after}")
    return text


def _mathml(tex: str, display: str) -> str:
    tex = tex.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip()
    tex = re.sub(r"\\log\s+(?=[A-Za-z\\])", r"\\log\\, ", tex)  # MathML sets no space after a name
    return latex2mathml.converter.convert(tex, display=display)
