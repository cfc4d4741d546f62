"""The colours of reports: one table for the page and its figures, in a light and a dark version.

Figures are drawn with the light values; `themed` turns each into a CSS variable with that value as its fallback, so an
inlined SVG follows the reader's theme and the same SVG saved alone still has its colours.
"""

import re

LIGHT = {
    "paper": "#fcfcfb",
    "card": "#f4f5f6",
    "ink": "#1c2127",
    "muted": "#5d6673",
    "rule": "#dfe2e6",
    "accent": "#2264b0",
    "soft": "#9fb3c8",
    "good": "#18794e",
    "bad": "#c4321f",
    "warm": "#b7690d",
}
DARK = {
    "paper": "#14171b",
    "card": "#1e2329",
    "ink": "#e7eaee",
    "muted": "#a2acb8",
    "rule": "#343b44",
    "accent": "#7db4f3",
    "soft": "#5f7388",
    "good": "#58c596",
    "bad": "#ff8a78",
    "warm": "#f0b25c",
}


def themed(svg: str) -> str:
    """Replace every colour of LIGHT, written as a hex value inside a style attribute, by its CSS variable."""

    def replaced(style: re.Match[str]) -> str:
        text = style.group()
        for name, value in LIGHT.items():
            text = text.replace(value, f"var(--{name}, {value})")
        return text

    return re.sub(r'\sstyle="[^"]*"', replaced, svg)


def css_variables() -> str:
    """Both tables as CSS custom properties, dark under prefers-color-scheme."""
    light = "".join(f"--{name}:{value};" for name, value in LIGHT.items())
    dark = "".join(f"--{name}:{value};" for name, value in DARK.items())
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
