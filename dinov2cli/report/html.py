"""A report as one HTML file: no script, nothing fetched, readable in light and dark and on paper.

All text is escaped; figures are SVG (inlined) or PNG and JPEG bytes (embedded).
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dinov2cli.artifacts.output import write_aside
from dinov2cli.report.palette import css_variables

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:62rem;margin:0 auto;padding:2.5rem 1.5rem 4rem}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.01em;margin:0 0 .4rem;text-wrap:balance}
h2{font-size:1.25rem;line-height:1.3;margin:3rem 0 .6rem;padding-top:1.2rem;border-top:1px solid var(--rule)}
p{margin:.5rem 0;max-width:46rem}
.lead{color:var(--muted);margin:0 0 1.6rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.8rem;margin:1.2rem 0}
.tile{background:var(--card);border-radius:.5rem;padding:.9rem 1rem}
.tile b{display:block;font-size:1.55rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.tile span,.tile small{display:block;color:var(--muted);font-size:.85rem;line-height:1.4}
ul{margin:.6rem 0;padding-left:1.2rem;max-width:46rem}
li{margin:.25rem 0}
figure{margin:1.2rem 0 1.6rem}
figure svg,figure img{display:block;max-width:100%;height:auto;font-family:inherit}
figcaption{color:var(--muted);font-size:.9rem;margin-top:.5rem;max-width:46rem}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.93rem;font-variant-numeric:tabular-nums;min-width:24rem}
caption{text-align:left;color:var(--muted);font-size:.9rem;padding-bottom:.4rem}
th,td{padding:.4rem 1.1rem .4rem 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
th{font-weight:600;color:var(--muted);font-size:.85rem}
th.number,td.number{text-align:right;white-space:nowrap}
details{margin:1.2rem 0}
summary{cursor:pointer;color:var(--muted)}
pre{background:var(--card);border-radius:.5rem;padding:.9rem 1rem;overflow-x:auto;
 font:13px/1.5 ui-monospace,"SF Mono",Menlo,"DejaVu Sans Mono",monospace}
footer{margin-top:3.5rem;color:var(--muted);font-size:.85rem}
@media print{main{max-width:none;padding:0}figure,.tile,table{break-inside:avoid}}
"""
# Nothing may be fetched even if a caller's SVG asks for it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_INTERVAL = r"\[[^\]]*\d[^\]]*\]"
_NUMBER = re.compile(rf"[+\-−±<>≤≥]?\s?\d[\d,.]*\s?(%|points|s|ms|px|×)?(\s{_INTERVAL})?|{_INTERVAL}")
_IMAGE_TYPES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))


@dataclass(frozen=True)
class Tile:
    """One figure of the summary: what it is, the figure, and a few words beside it."""

    name: str
    value: str
    note: str = ""


class Report:
    """A page made from top to bottom; every method adds to its end and returns the report.

    `lead` is a sentence under the title.
    """

    def __init__(self, title: str, *, lead: str = "") -> None:
        self.title = title
        self._lead = lead
        self._parts: list[str] = []
        self._figures = 0

    def summary(self, sentences: Sequence[str], *, tiles: Sequence[Tile] = ()) -> "Report":
        """Add what the reader should know first: figures in tiles, then plain sentences."""
        if tiles:
            cells = "".join(
                f'<div class="tile"><span>{escape(tile.name)}</span><b>{escape(tile.value)}</b>'
                f"{f'<small>{escape(tile.note)}</small>' if tile.note else ''}</div>"
                for tile in tiles
            )
            self._parts.append(f'<div class="tiles">{cells}</div>')
        if sentences:
            self._parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in sentences) + "</ul>")
        return self

    def section(self, heading: str, text: str = "") -> "Report":
        """Start a section; empty lines in `text` separate paragraphs."""
        self._parts.append(f"<h2>{escape(heading)}</h2>")
        return self.text(text) if text else self

    def text(self, text: str) -> "Report":
        """Add paragraphs, separated by empty lines."""
        self._parts += [f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip()]
        return self

    def figure(self, image: str | bytes, caption: str = "") -> "Report":
        """Add a figure: an SVG (text) or the bytes of an SVG, PNG or JPEG. Raises ValueError for anything else."""
        self._figures += 1
        shown = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{_embed(image, self._figures, caption)}{shown}</figure>")
        return self

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "") -> "Report":
        """Add a table; a column whose cells all read as numbers is aligned to the right.

        Raises ValueError if a row is not as long as the headers.
        """
        cells = [[str(cell) for cell in row] for row in rows]
        if any(len(row) != len(headers) for row in cells):
            raise ValueError(f"table rows must have {len(headers)} cells, one for each header")
        numeric = [
            bool(cells) and all(not row[i] or _NUMBER.fullmatch(row[i].strip()) for row in cells)
            for i in range(len(headers))
        ]

        def line(tag: str, values: Sequence[str]) -> str:
            marks = [' class="number"' if right else "" for right in numeric]
            pairs = zip(values, marks, strict=True)
            return "<tr>" + "".join(f"<{tag}{mark}>{escape(value)}</{tag}>" for value, mark in pairs) + "</tr>"

        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        body = "".join(line("td", row) for row in cells)
        self._parts.append(
            f'<div class="scroll"><table>{title}<thead>{line("th", headers)}</thead><tbody>{body}</tbody></table></div>'
        )
        return self

    def details(self, summary: str, text: str) -> "Report":
        """Add text as it is (a recipe, a log), folded away under `summary` until clicked."""
        self._parts.append(f"<details><summary>{escape(summary)}</summary><pre>{escape(text.strip())}</pre></details>")
        return self

    def footer(self, text: str) -> "Report":
        """Add small print, for example how the report was made."""
        self._parts.append(f"<footer>{escape(text)}</footer>")
        return self

    def html(self) -> str:
        """Return the whole page."""
        lead = f'<p class="lead">{escape(self._lead)}</p>' if self._lead else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(self.title)}</title>\n<style>{css_variables()}{_STYLE}</style></head>\n"
            f"<body><main>\n<h1>{escape(self.title)}</h1>{lead}\n"
            + "\n".join(self._parts)
            + "\n</main></body></html>\n"
        )

    def write(self, path: Path | str) -> Path:
        """Write the page aside and rename it to `path`; raises what `write_aside` raises."""
        path = Path(path)

        def write_page(aside: Path) -> None:
            aside.write_text(self.html(), encoding="utf-8")

        write_aside(path, write_page)
        return path


def _embed(image: str | bytes, number: int, description: str) -> str:
    if isinstance(image, bytes):
        for magic, media_type in _IMAGE_TYPES:
            if image.startswith(magic):
                data = base64.b64encode(image).decode("ascii")
                return f'<img alt="{escape(description)}" src="data:{media_type};base64,{data}">'
        try:
            image = image.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("a figure must be SVG, PNG or JPEG") from None
    start = image.find("<svg")
    if start < 0:
        raise ValueError("a figure must be SVG, PNG or JPEG")
    return _inline(image[start:], number, description)


def _inline(svg: str, number: int, description: str) -> str:
    """Make ids unique within the page, which holds several figures, and describe this one to screen readers."""
    prefix = f"figure{number}-"
    svg = re.sub(r'(\sid=")', rf"\1{prefix}", svg)
    svg = re.sub(r"(url\(#)", rf"\1{prefix}", svg)
    svg = re.sub(r'(href="#)', rf"\1{prefix}", svg)
    label = f' aria-label="{escape(description)}"' if description else ""
    return f'<svg role="img"{label}{svg[len("<svg") :]}'
