"""What a page about differences between groups says beside its figures: limits, licence and consent, the protocol.

Facts about data sets: Dollar Street is a project of Gapminder, whose photographs are given out under CC BY 4.0
(gapminder.org); Casual Conversations comes under a data user agreement, for assessing models that are already trained,
with age and gender stated by the paid participants and skin type labelled by annotators (Hazirbas et al. 2021).
"""

from typing import Any

from dinov2cli.report.fairness_data import FairnessPage

TITLES = {
    "geo": "Objects of homes around the world: differences between groups",
    "people": "Labels given to people: differences between groups",
    "audit": "Answers of a classifier: differences between groups",
}


def question(protocol: str) -> str:
    """What was asked, in one sentence."""
    return {
        "geo": "Does a model recognise household objects equally often in all parts of the world and at all incomes?",
        "people": "Does a model give images of people of different groups the same kinds of label equally often?",
        "audit": "Does a classifier on this model err equally often for all groups of images?",
    }.get(protocol, "Do the figures of this model differ between groups of images?")


def reading(page: FairnessPage) -> str:
    """How to read charts and tables."""
    clustered = ""
    if page.clustered:
        clustered = f" Images of the same {page.unit} are alike, so intervals count them as fewer images."
    return (
        "A dot is the rate of a group, the line through it holds the true rate with "
        f"{100 * page.confidence:g} % confidence: a long line means few images.{clustered} ★ marks the best group. "
        "Grey hollow dots are groups with too few images; they are shown but take no part in gaps and tests. Images "
        "whose group is not known are counted in the last line. Scales show the part of 0 to 100 % that is used.\n\n"
        "A gap is the highest rate minus the lowest, in points: from 60 % to 80 % are 20 points. Its interval allows "
        "for the fact that the two groups were picked because they lie farthest apart. p says how often chance alone "
        f"makes such a gap; below {1 - page.confidence:.2g}, corrected for the number of comparisons, a gap is called "
        "beyond chance. In a table of groups p tests one group against all others."
    )


def limits(protocol: str) -> list[str]:
    """What the figures of a page do not say."""
    said = [
        "A gap that was not found is no proof that there is none. The upper end of its interval says how large a gap "
        "this data could hide.",
        "The figures come from the backbone and a classifier together: the images and labels that the classifier was "
        "trained on enter the result, and another classifier on the same backbone may give other gaps.",
        "Differences are associations, not causes. Groups differ in more than their name: light, camera, size of the "
        "object, kind of scene.",
        "A data set is a sample that somebody chose. Intervals cover the luck of this sample, not what the choice left "
        "out, and say nothing about other places, people, times or tasks.",
        "Small groups are left out of gaps. A group that is missing here may be the one that is treated worst.",
        "An equal rate in all groups is one view among several; it does not say that errors cost every group the same, "
        "nor that the use of the model is right.",
    ]
    if protocol == "geo":
        said.insert(
            2,
            "Region and income stand for much else. The income of a home is an estimate made when it was photographed, "
            "a few homes stand for a country, and the names of objects follow the habits of those who labelled them.",
        )
        return said
    said.insert(
        2,
        "Groups are those of the labels: stated by the people themselves or assigned by annotators, who may disagree "
        "or be wrong. Skin types, age ranges and genders in a list are coarse stand-ins and do not describe a person."
        if protocol == "people"
        else "Groups are those of the file of attributes: where people or programs assigned them, their errors and "
        "their choice of categories enter every figure.",
    )
    if protocol == "people":
        said.append(
            "That features can tell groups apart is no reason to tell them apart: no system that infers gender, age, "
            "skin tone or origin of people should be built from this."
        )
    return said


def licence(protocol: str) -> str:
    """A reminder of what the data may be used for."""
    own = "Check the licence of your data, and what the people in the pictures agreed to, before you show or pass on "
    own += "pictures or figures."
    if protocol == "geo":
        return (
            "Gapminder gives out the photographs of Dollar Street under Creative Commons Attribution 4.0, which asks "
            f"for credit; copies of the data set elsewhere may carry other terms. {own}"
        )
    if protocol == "people":
        return (
            "Casual Conversations comes under a data user agreement of its own, for assessing models that are already "
            "trained; read there what it permits and forbids, above all on training with the data, on inferring "
            f"attributes of people and on showing faces. {own} Pictures of people are personal data in many countries."
        )
    return f"{own} Pictures of people, and attributes such as origin or health, are personal data in many countries."


def pictures(page: FairnessPage) -> str:
    """Why there are no pictures on the page."""
    shown = {"geo": "homes and people", "people": "people"}.get(page.protocol, "people or private places")
    return (
        f"Pictures are not shown: they may be of {shown}, and nobody may have agreed to have them passed on in a "
        "report. "
        "--show-images adds examples, for data whose licence lets you show them."
    )


def protocol_words(page: FairnessPage) -> list[str]:
    """How every figure was computed; numbers from the settings where they are known."""
    settings = page.settings
    cluster = page.clustered
    return [
        *_measure(page.protocol, settings),
        f"Rates: the share of the images of a group. Intervals ({100 * page.confidence:g} %) are Wilson's"
        + (
            ", with the number of images replaced by the effective number given clusters (Korn and Graubard 1998)."
            if cluster
            else "."
        ),
        f"Groups enter comparisons{_least(settings)}. The gap of an axis is the highest minus the lowest rate of them; "
        "the drop is (best − group) / best.",
        "Intervals of gaps and of differences to the best group are simultaneous over all pairs of groups of an axis: "
        f"critical values from a joint bootstrap{_times(settings, 'resamples')} of whole "
        f"{'clusters' if cluster else 'images'}, limits by Zou's method (MOVER).",
        f"p: outcomes are shuffled against groups{_shuffles(page)}, "
        + ("whole clusters together where a cluster lies in one group, " if cluster else "")
        + "p = (1 + shuffles with at least such a gap) / (1 + shuffles). A group is tested against all others, "
        "corrected over the groups of an axis by the maximum (Westfall and Young). Corrected p: gaps by Holm over all "
        "comparisons of a model of one kind, groups times their number. Kinds are the main measures, the measures of "
        "single classes, and those of nearest images.",
    ]


def _shuffles(page: FairnessPage) -> str:
    counts = sorted({count for gap in page.gaps if (count := page.shuffles(gap)) is not None})
    return f" ({' or '.join(f'{count:,}' for count in counts)} times)" if counts else ""


def _measure(protocol: str, settings: Any) -> list[str]:
    top = settings.get("top", 5)
    if protocol == "geo":
        return [f"Recognised: any of the first {top} answers of the classifier is a class of what the image shows."]
    if protocol == "people":
        return [
            f"A label counts where a class of its kind is among the first {top} answers with a confidence of at least "
            f"{settings.get('threshold', 0.1):g} (protocol of Goyal et al. 2022, the kinds Human, Possibly-Human, "
            "Non-Human and Crime)."
        ]
    if protocol == "audit":
        return [
            "Accuracy: the first answer is the class of the image. Recall of a class: the same among its images. False "
            "positives of a class: images of other classes that are taken for it. Equalised odds: the larger of the "
            "largest differences in the two (Hardt et al. 2016)."
        ]
    return []


def _least(settings: Any) -> str:
    parts = [f"{settings['min_images']:,} images"] if settings.get("min_images") else []
    parts += [f"{settings['min_clusters']:,} clusters"] if settings.get("min_clusters") else []
    return f" from {' and '.join(parts)}" if parts else " where they have enough images"


def _times(settings: Any, key: str) -> str:
    return f" ({settings[key]:,} {key})" if isinstance(settings.get(key), int) else ""
