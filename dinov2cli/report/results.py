"""Figures of results as text for people."""

import json

from dinov2cli.artifacts.results import ResultRow


def percent(value: float) -> str:
    """A fraction as '63.0 %'."""
    return f"{100 * value:.1f} %"


def with_interval(value: float, low: float, high: float) -> str:
    """A fraction with its interval, '63.0 % [60.1, 65.8]'."""
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def metric_name(metric: str) -> str:
    """'top1_k20' as 'top-1, k = 20', 'mean_per_class' as 'mean per class'."""
    words = metric.split("_")
    words = [f"top-{w[3:]}" if w.startswith("top") and w[3:].isdigit() else w for w in words]
    words = [f", k = {w[1:]}" if w.startswith("k") and w[1:].isdigit() else f" {w}" for w in words]
    return "".join(words).strip(" ,")


def is_share(row: ResultRow) -> bool:
    """Whether the figure is a fraction, shown in per cent."""
    return row.settings.get("unit", "share") == "share"


def value_text(row: ResultRow) -> str:
    """The value in its unit: '63.0 %', '0.512 m'."""
    if is_share(row):
        return percent(row.value)
    return f"{row.value:.3f}" + (" m" if row.settings["unit"] == "metres" else "")


def interval_text(row: ResultRow) -> str:
    """The interval without its unit: '[60.1, 65.8]'."""
    if is_share(row):
        return f"[{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]"
    return f"[{row.ci_low:.3f}, {row.ci_high:.3f}]"


def plain_text(value: object) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
