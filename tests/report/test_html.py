import re
from html.parser import HTMLParser

import pytest

from dinov2cli.errors import UserError
from dinov2cli.report.html import Report, Tile
from dinov2cli.report.palette import DARK, LIGHT, themed

PNG = b"\x89PNG\r\n\x1a\nrest"


class Structure(HTMLParser):
    """Collects ids, links and text; fails on tags that do not close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.text, self.tags = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_every_text_is_escaped():
    bad = "<script>alert('x')</script> & \"q\""
    page = (
        Report(bad, lead=bad)
        .summary([bad], tiles=[Tile(bad, bad, bad)])
        .section(bad, bad)
        .figure(PNG, bad)
        .figure("<svg></svg>", bad)
        .table([bad], [[bad]], caption=bad)
        .footer(bad)
        .html()
    )
    structure = Structure(page)
    assert "script" not in {tag for tag, _ in structure.tags}
    assert "<script" not in page
    texts = [text.strip() for text in structure.text]
    # Title twice, lead, 3 in the tile, sentence, 2 of the section, 2 captions, 3 of the table, footer.
    assert texts.count(bad) == 15
    image = next(attrs for tag, attrs in structure.tags if tag == "img")
    assert image["alt"] == bad


def test_nothing_is_fetched():
    page = Report("t").figure(PNG).figure('<svg><image href="data:image/png;base64,xx"/></svg>').html()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "<link" not in page and "<script" not in page and "@import" not in page


def test_ids_of_two_figures_do_not_meet():
    svg = '<?xml version="1.0"?>\n<svg xmlns="x"><defs><path id="a"/></defs><use href="#a" clip-path="url(#a)"/></svg>'
    page = Report("t").figure(svg).figure(svg.encode(), "second").html()
    ids = Structure(page).ids
    assert len(ids) == len(set(ids)) == 2
    assert 'href="#figure2-a"' in page and "url(#figure2-a)" in page
    assert "<?xml" not in page
    assert '<svg role="img" aria-label="second" xmlns="x">' in page


@pytest.mark.parametrize("figure", ["no picture", b"GIF89a", b"\xff\x00\x01"])
def test_a_figure_of_another_kind_is_refused(figure):
    with pytest.raises(ValueError, match=r"^a figure must be SVG, PNG or JPEG$"):
        Report("t").figure(figure)


def test_number_columns_are_aligned_right():
    page = Report("t").table(
        ["task", "value", "interval", "mixed"],
        [["knn", "63.0 %", "41.2 % [38.0, 44.3]", "3"], ["5", "+2.1 points", "[1.0, 2.0]", "three"]],
    )
    cells = [attrs.get("class") for tag, attrs in Structure(page.html()).tags if tag == "td"]
    assert cells[:4] == [None, "number", "number", None]


def test_a_short_row_is_refused():
    with pytest.raises(ValueError, match="table rows must have 2 cells"):
        Report("t").table(["a", "b"], [["1"]])


def test_write_makes_folders_and_leaves_nothing_aside(tmp_path):
    path = Report("Title").text("one\n\ntwo").write(tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "<p>one</p>\n<p>two</p>" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*report.html: .*; choose another place with -o"):
        Report("t").write(tmp_path / "file" / "report.html")


def test_colours_follow_the_theme_and_are_told_apart():
    assert set(LIGHT) == set(DARK) and len(set(LIGHT.values())) == len(LIGHT)
    ink = LIGHT["ink"]
    assert themed(f'<p style="fill: {ink}">{ink}</p>') == f'<p style="fill: var(--ink, {ink})">{ink}</p>'


@pytest.mark.parametrize("table", [LIGHT, DARK])
@pytest.mark.parametrize("name", ["ink", "muted", "accent", "good", "bad", "warm"])
def test_text_and_marks_stand_out_from_the_paper(table, name):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    # WCAG 2 contrast ratio: 4.5 for text, 3 for graphics.
    high, low = sorted((luminance(table[name]), luminance(table["paper"])), reverse=True)
    assert (high + 0.05) / (low + 0.05) > (4.5 if name in ("ink", "muted") else 3)
