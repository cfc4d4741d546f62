"""Sentences about differences between groups, for readers who are no specialists.

A missing difference is never called a good result: what could hide in the data is said instead.
"""

import re
from collections.abc import Iterable, Sequence

from dinov2cli.report.fairness_data import CROSS, FALSE, RECALL, SAME, FairnessPage, Gap, is_main, of_model

_TOP = re.compile(r"top(\d+)")
_LABELS = ("Human", "Possibly-Human", "Non-Human", "Crime")
_PLACES = ("region", "country", "continent")
_MOST = 8  # sentences of one kind


def share(value: float | None, digits: int = 1) -> str:
    """A fraction as '61.2 %'."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def points(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """A difference of fractions in points without the unit, with a true minus sign."""
    if value is None:
        return "–"
    text = f"{100 * value:{'+' if signed else ''}.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def span(low: float | None, high: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """An interval in points or per cent, '[12.0, 25.1]'; empty where there is none."""
    if low is None or high is None:
        return ""
    return f"[{points(low, digits, signed=signed)}, {points(high, digits, signed=signed)}]"


def estimate(
    value: float | None, low: float | None, high: float | None, digits: int = 1, *, signed: bool = False
) -> str:
    """A difference in points with its interval; empty where there is none."""
    if value is None:
        return ""
    return f"{points(value, digits, signed=signed)} {span(low, high, digits, signed=signed)}".strip()


def digits_for(values: Iterable[float | None]) -> int:
    """One decimal of a per cent, two where the largest value is below 1 %."""
    return 2 if 0 < max((abs(value) for value in values if value is not None), default=0) < 0.01 else 1


def p_text(p: float | None) -> str:
    """A p-value with as many digits as it deserves."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def joined(words: Sequence[str]) -> str:
    """'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def tied(text: str) -> str:
    """The text with no line break inside '61.2 %' and '[12.0, 25.1]'."""
    return (
        re.sub(r"\[(\S+), (\S+)\]", "[\\1,\N{NO-BREAK SPACE}\\2]", text)
        .replace(" %", "\N{NO-BREAK SPACE}%")
        .replace("% (", "%\N{NO-BREAK SPACE}(")
    )


def metric_title(protocol: str, metric: str) -> str:
    """What a metric is called over a chart and a column."""
    if protocol == "geo":
        return "objects recognised"
    if metric in _LABELS:
        return f"label {metric}"
    if same := SAME.fullmatch(metric):
        return f"same {same[1]} among the {same[2]} nearest"
    if top := _TOP.fullmatch(metric):
        return f"class among the first {top[1]} answers"
    return metric.replace("_", " ")


def measure_name(protocol: str, metric: str) -> str:
    """What a metric is called in a column of measures."""
    return metric_title(protocol, metric).removeprefix("label ")


def who(protocol: str, axis: str, group: str) -> str:
    """Whose images a group holds, to follow 'images': 'of low-income homes', 'of people aged 18–30'."""
    if protocol == "geo" and axis == "income" and group.isalpha():
        return f"of {group}-income homes"
    axes, groups = axis.split(CROSS), group.split(CROSS)
    if len(axes) != len(groups):
        axes, groups = [axis], [group]
    parts = [_part(protocol, *pair) for pair in zip(axes, groups, strict=True)]
    if protocol == "geo":
        return f"of homes {' '.join(parts)}"
    return f"of people {joined(parts)}" if protocol == "people" else joined(parts)


def _part(protocol: str, axis: str, group: str) -> str:
    """One attribute: 'in Africa', 'with low income', 'aged 18–30'."""
    if protocol == "geo" and axis in _PLACES:
        return f"in {group}"
    if protocol == "geo" and axis == "income":
        return f"with {group} income" if group.isalpha() else f"with an income {_range(group)}"
    if protocol == "people" and axis == "age":
        return f"aged {_range(group)}"
    if protocol == "people" and axis == "skin tone":
        return f"with {group} skin"
    return f"with {axis} {_range(group)}"


def _range(group: str) -> str:
    """The name of a bucket in words."""
    for sign, words in (("≥ ", "{} or more"), ("> ", "above {}"), ("< ", "below {}"), ("≤ ", "up to {}")):
        if group.startswith(sign):
            return words.format(group.removeprefix(sign))
    return group


def claim(protocol: str, gap: Gap) -> str:
    """'Objects of low-income homes are recognised in 61.2 % of images, those of high-income homes in 80.1 %'.

    Raises ValueError if the gap has no groups.
    """
    if gap.worst is None or gap.best is None:
        raise ValueError(f"no groups of {gap.axis} were compared")
    digits = digits_for([gap.worst_value, gap.best_value])
    first, second = who(protocol, gap.axis, gap.worst), who(protocol, gap.axis, gap.best)
    low, high = share(gap.worst_value, digits), share(gap.best_value, digits)
    metric = gap.metric
    if protocol == "geo":
        return f"Objects {first} are recognised in {low} of images, those {second} in {high}"
    if metric in _LABELS:
        return f"Images {first} get a label of the kind {metric} in {low} of cases, those {second} in {high}"
    if same := SAME.fullmatch(metric):
        return (
            f"Of the {same[2]} nearest images, {low} share the {same[1]} for images {first}, {high} for those {second}"
        )
    if metric.startswith(RECALL):
        return (
            f"Images of class {metric.removeprefix(RECALL)} {first} are recognised as such in {low} of cases, "
            f"those {second} in {high}"
        )
    if metric.startswith(FALSE):
        return (
            f"Images of other classes {first} are taken for {metric.removeprefix(FALSE)} in {low} of cases, "
            f"those {second} in {high}"
        )
    if metric == "accuracy":
        return f"Images {first} are classified correctly in {low} of cases, those {second} in {high}"
    if top := _TOP.fullmatch(metric):
        return (
            f"The class of images {first} is among the first {top[1]} answers in {low} of cases, "
            f"of those {second} in {high}"
        )
    return f"{metric_title(protocol, metric)} is {low} of images {first} and {high} of those {second}"


def chance(gap: Gap, permutations: int | None, tested: int) -> str:
    """How often chance alone makes such a gap, in shuffles, and the corrected p."""
    corrected = f"p, corrected for {tested} comparisons" if tested > 1 else "p"
    tail = f"({corrected}: {p_text(gap.p_corrected)})"
    if not permutations or gap.p_value is None:
        return tail
    # p = (1 + count) / (1 + B), so the count is exact, if B is known.
    count = gap.p_value * (1 + permutations) - 1
    if abs(count - round(count)) > 0.01:
        return f"chance alone makes such a gap in about {share(gap.p_value)} of shuffles {tail}"
    often = "none" if round(count) <= 0 else f"{count:,.0f}"
    return f"chance alone makes such a gap in {often} of {permutations:,} shuffles {tail}"


def gap_sentence(page: FairnessPage, gap: Gap) -> str:
    """One comparison in full: both ends, the gap, and what chance does."""
    digits = digits_for([gap.worst_value, gap.best_value])
    size = f"{points(gap.gap, digits)} points {span(gap.gap_low, gap.gap_high, digits)}".strip()
    said = chance(gap, page.shuffles(gap), page.tested(gap))
    return f"{claim(page.protocol, gap)}: a gap of {size}; {said}."


def hidden_sentence(protocol: str, metric: str, gaps: Sequence[Gap], *, several: bool = False) -> str:
    """That no gap was found in these axes, and how large one could hide."""
    names = joined([gap.axis for gap in gaps])
    digits = digits_for([rate for gap in gaps for rate in (gap.worst_value, gap.best_value)])
    largest = [points(gap.gap_high, digits) for gap in gaps]
    each = f"{joined(largest)} points" + (", in this order," if len(gaps) > 1 else "")
    title = metric_title(protocol, metric)
    of = " in any model" if several else ""
    return (
        f"{title[:1].upper()}{title[1:]}, by {names}: no gap beyond chance was found{of}. That is no proof that there "
        f"is none: gaps of up to {each} could hide in this data."
    )


def answers(page: FairnessPage) -> list[str]:
    """The answer of the page in sentences, for one model or several."""
    if len(page.models) > 1:
        return _answers_of_several(page)
    gaps = _main(of_model(page.gaps, page.models[0])) if page.models else []
    compared = [gap for gap in gaps if gap.gap is not None]
    found = [gap for gap in compared if gap.significant]
    sentences = [_count(len(found), len(compared))] if len(compared) > 1 else []
    sentences += [gap_sentence(page, gap) for gap in found[:_MOST]]
    if len(found) > _MOST:
        sentences.append(f"{len(found) - _MOST} more gaps beyond chance are in the table of all comparisons.")
    for metric in dict.fromkeys(gap.metric for gap in compared):
        rest = [gap for gap in compared if gap.metric == metric and not gap.significant]
        if rest:
            sentences.append(hidden_sentence(page.protocol, metric, rest))
    return sentences + _not_compared(gaps)


def _main(gaps: Sequence[Gap]) -> list[Gap]:
    return [gap for gap in gaps if is_main(gap.metric)]


def _count(found: int, compared: int, whose: str = "") -> str:
    if found == 0:
        return f"In none of {compared} comparisons between groups was a gap found that is beyond chance."
    return f"In {found} of {compared} comparisons between groups there is a gap{whose} that is beyond chance."


def _not_compared(gaps: Sequence[Gap]) -> list[str]:
    axes = dict.fromkeys(gap.axis for gap in gaps if gap.gap is None)
    return [f"Groups of {axis} cannot be compared: fewer than two of them have enough images." for axis in axes]


def _answers_of_several(page: FairnessPage) -> list[str]:
    """A sentence for each comparison with all models in it."""
    families: dict[tuple[str, str], list[Gap]] = {}
    for gap in _main(page.gaps):
        families.setdefault((gap.axis, gap.metric), []).append(gap)
    compared = {key: gaps for key, gaps in families.items() if any(gap.gap is not None for gap in gaps)}
    found = [gaps for gaps in compared.values() if any(gap.significant for gap in gaps)]
    sentences = [_count(len(found), len(compared), " of at least one model")] if len(compared) > 1 else []
    sentences += [_family(page.protocol, gaps) for gaps in found[:_MOST]]
    if len(found) > _MOST:
        sentences.append(f"{len(found) - _MOST} more gaps beyond chance are in the table of all comparisons.")
    if any(gap.gap is not None and not gap.significant for gaps in found for gap in gaps):
        sentences.append(
            "Within chance does not say that there is no gap: one as large as the upper end of the interval could hide."
        )
    widest: dict[str, list[Gap]] = {}
    for (_, metric), gaps in compared.items():
        if gaps not in found:
            widest.setdefault(metric, []).append(max(gaps, key=lambda gap: gap.gap_high or 0))
    sentences += [hidden_sentence(page.protocol, metric, gaps, several=True) for metric, gaps in widest.items()]
    return sentences + _not_compared([gap for key, gaps in families.items() if key not in compared for gap in gaps])


def _family(protocol: str, gaps: Sequence[Gap]) -> str:
    title = metric_title(protocol, gaps[0].metric)
    parts = []
    for gap in gaps:
        if gap.gap is None:
            continue
        digits = digits_for([gap.worst_value, gap.best_value])
        verdict = "beyond chance" if gap.significant else "within chance"
        size = f"{points(gap.gap, digits)} points {span(gap.gap_low, gap.gap_high, digits)}".strip()
        parts.append(f"{gap.model} {size}, {verdict}")
    ends = {(gap.worst, gap.best) for gap in gaps if gap.significant}
    end = ""
    if len(ends) == 1 and (pair := next(iter(ends)))[0] is not None:
        low, high = ("highest", "lowest") if gaps[0].better == "low" else ("lowest", "highest")
        ends_of = [who(protocol, gaps[0].axis, str(name)) for name in pair]
        end = f" The {low} rate is that of images {ends_of[0]}, the {high} that of images {ends_of[1]}."
    return f"{title[:1].upper()}{title[1:]}, gap by {gaps[0].axis}: {'; '.join(parts)}.{end}"
