"""The report as one self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ppvae.plots import DPI
from ppvae.report.section import Section

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1c1c; --soft: #5f6368; --line: #e3e3e3; --warn: #b54708;
  --ground: #fff6ec; --code: #f7f7f7; --mark: #e0a458; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e7e9ec; --soft: #a3abb5; --line: #323943; --warn: #ffb35c; --ground: #2b2418;
    --code: #1c2127; --mark: #b98338; }
  figure img { background: #fff; border-radius: 8px; padding: 6px; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 36px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 52px 0 6px; padding-top: 14px; border-top: 1px solid var(--line); }
p.lead { color: var(--soft); margin: 0 0 28px; overflow-wrap: anywhere; }
nav { margin: 26px 0 0; font-size: 14px; color: var(--soft); }
nav a { color: var(--soft); margin-right: 14px; white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin: 0 0 24px; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: 12px 16px 10px; }
.card .label { font-size: 13px; color: var(--soft); }
.card .value { font-size: 27px; line-height: 1.3; font-variant-numeric: tabular-nums; white-space: nowrap; }
.card .value small { font-size: 16px; color: var(--soft); }
.card .below { font-size: 13px; color: var(--soft); }
.card.warn { border-color: var(--mark); background: var(--ground); }
.card.warn .value { color: var(--warn); }
.remark { border-left: 3px solid var(--mark); background: var(--ground); margin: 0 0 12px; padding: 8px 14px; }
.remark.note { border-color: var(--line); background: none; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th, td { text-align: left; vertical-align: top; padding: 5px 0; border-bottom: 1px solid var(--line); }
th { width: 190px; padding-right: 16px; font-weight: normal; color: var(--soft); }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 14px 0 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption, p.reason { margin: 8px 0 0; max-width: 820px; font-size: 14.5px; color: var(--soft); }
p.reason { font-style: italic; }
details { margin-top: 14px; }
summary { cursor: pointer; }
pre { background: var(--code); padding: 14px 16px; border-radius: 6px; font-size: 13px; line-height: 1.45;
  overflow-x: auto;  white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 600px) { main { padding: 22px 16px 60px; } th { width: 110px; } nav { line-height: 1.9; } }
@media print { :root { color-scheme: light; } }
@media print { main { padding: 0; } nav { display: none; } figure, .card { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Card:
    """A number at the top of the page: its label, its value, a smaller text beside it, and a line below.

    `warn` marks a value that needs attention.
    """

    label: str
    value: str
    beside: str = ""
    below: str = ""
    warn: bool = False


@dataclass(frozen=True)
class PageHeader:
    """The top of the page: title, description, cards, remarks, and a table of facts.

    `alarm` marks the remarks as warnings.
    """

    title: str
    description: str
    cards: Sequence[Card]
    remarks: Sequence[str]
    facts: Sequence[tuple[str, str]]
    alarm: bool = True


def render_page(
    header: PageHeader, sections: Sequence[tuple[Section, bytes | None]], details: Mapping[str, str]
) -> str:
    """The HTML text: the header, each section with its PNG, and collapsed `details` {title: text}, all escaped."""
    links = " ".join(f'<a href="#{escape(section.key)}">{escape(section.title)}</a>' for section, _ in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(header.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{_header_html(header)}
<nav>{links}</nav>
{"".join(_section_html(section, png) for section, png in sections)}
<section id="configuration">
<h2>Configuration</h2>
{"".join(_details_html(title, text) for title, text in details.items())}
</section>
</main>
</body>
</html>
"""


def _header_html(header: PageHeader) -> str:
    cards = "".join(_card_html(card) for card in header.cards)
    kind = "remark" if header.alarm else "remark note"
    remarks = "".join(f'<p class="{kind}">{escape(text)}</p>\n' for text in header.remarks)
    facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>\n" for name, text in header.facts)
    return f"""<h1>{escape(header.title)}</h1>
<p class="lead">{escape(header.description)}</p>
<div class="cards">
{cards}</div>
{remarks}<table>
{facts}</table>"""


def _card_html(card: Card) -> str:
    beside = f" <small>{escape(card.beside)}</small>" if card.beside else ""
    return (
        f'<div class="card{" warn" if card.warn else ""}"><div class="label">{escape(card.label)}</div>'
        f'<div class="value">{escape(card.value)}{beside}</div><div class="below">{escape(card.below)}</div></div>\n'
    )


def _section_html(section: Section, png: bytes | None) -> str:
    if section.markup:
        body = section.markup
    elif section.content is None or png is None:
        body = f'<p class="reason">Not available. {escape(section.reason)}</p>'
    else:
        width = round(section.content.figure.get_figwidth() * DPI / 2)
        data = base64.b64encode(png).decode()
        body = (
            f'<figure><img src="data:image/png;base64,{data}" width="{width}" alt="{escape(section.title)}">\n'
            f"<figcaption>{escape(section.content.full_caption)}</figcaption></figure>"
        )
    return f'<section id="{escape(section.key)}">\n<h2>{escape(section.title)}</h2>\n{body}\n</section>\n'


def _details_html(title: str, text: str) -> str:
    return f"<details>\n<summary>{escape(title)}</summary>\n<pre>{escape(text)}</pre>\n</details>\n"
