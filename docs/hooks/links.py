"""The check of a built site: every link leads to a file and an anchor, and nothing is fetched from elsewhere."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "srcset")}


class Page(HTMLParser):
    """The anchors of a page, and its links as (tag, attribute, target)."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src", "srcset") and value:
                self.links.append((tag, name, value))


def check(site: Path) -> None:
    """Raises ValueError with every dead link, every resource of another host, and every path of this machine."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    wrong = [f"{path.relative_to(site.resolve())}: {fault}" for path in pages for fault in _faults(path, pages)]
    if wrong:
        raise ValueError("links:\n" + "\n".join(sorted(wrong)))


def _faults(path: Path, pages: dict[Path, Page]) -> list[str]:
    faults = ["a path of this machine"] if str(Path(__file__).parents[2]) in path.read_text() else []
    for tag, attribute, link in pages[path].links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            if (tag, attribute) in FETCHED and parts.scheme != "data" and (tag, attribute) != ("rel", "canonical"):
                faults.append(f"<{tag}> fetches {link}")
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.exists():
            faults.append(f"{link} leads nowhere")
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
            faults.append(f"{link} has no such anchor")
    return faults
