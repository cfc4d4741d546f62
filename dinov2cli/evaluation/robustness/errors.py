"""Errors under corruptions as one number: mCE and relative mCE of Hendrycks & Dietterich (ICLR 2019, section 4.1).

Both are means over images, for every image adds its own part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dinov2cli.artifacts.results import read_results
from dinov2cli.errors import UserError

Bools = npt.NDArray[np.bool_]

ALEXNET_CLEAN = 0.435
"""Share of ImageNet-1k validation images that AlexNet gets wrong (Hendrycks & Dietterich, table 1)."""

ALEXNET = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
"""Share that it gets wrong under each corruption of ImageNet-C, severities 1 to 5: what mCE is normalised by."""


@dataclass(frozen=True)
class Baseline:
    """The model that errors are set in relation to: its mean error over the severities by corruption, and its error on
    clean images."""

    name: str
    errors: dict[str, float]
    clean: float

    def check(self, corruptions: Sequence[str]) -> None:
        """Raise UserError if it lacks one of these corruptions, or makes no error under it."""
        missing = [kind for kind in corruptions if not self.errors.get(kind)]
        if missing:
            raise UserError(
                f"baseline {self.name} has no errors under {', '.join(missing)}, which nothing can be set in relation "
                "to: evaluate it under the same corruptions, take another, or --set baseline=none"
            )

    def unharmed(self, corruptions: Sequence[str]) -> list[str]:
        """Those of these corruptions that it gets no worse by: there is no relative error for them."""
        return [kind for kind in corruptions if not self.errors[kind] > self.clean]


def alexnet(corruptions: Sequence[str], severities: Sequence[int]) -> Baseline:
    """The usual baseline for ImageNet-1k, over these severities."""
    errors = {kind: float(np.mean([ALEXNET[kind][severity - 1] for severity in severities])) for kind in corruptions}
    return Baseline("alexnet", errors, ALEXNET_CLEAN)


def baseline_from(folder: str, task: str, corruptions: Sequence[str], severities: Sequence[int]) -> Baseline:
    """The one model in a folder of results of `task`, which must be over the same severities.

    Raises InputError where there are no results, UserError for several models or other severities.
    """
    rows = [row for row in read_results(Path(folder).expanduser()) if row.task == task]
    models = {row.model for row in rows}
    if len(models) != 1:
        raise UserError(
            f"baseline {folder} holds {task} results of {len(models)} models, expected one: "
            f"give a folder of `dinov2 eval {task}` of one model, or alexnet or none"
        )
    values = {row.metric: row.value for row in rows}
    found = rows[0].settings.get("found", {}).get("corruption_severities")
    if found != list(severities):
        raise UserError(
            f"baseline {folder} was made at severities {found}, this is {list(severities)}: evaluate it at the same"
        )
    errors = {kind: values[f"error_{kind}"] for kind in corruptions if f"error_{kind}" in values}
    return Baseline(folder, errors, 1 - values["top1"])


def corruption_error(wrong: Bools, baseline: npt.ArrayLike | None = None) -> npt.NDArray[np.float64]:
    """What each image adds to the mean corruption error, float64 [n]: its mean over images is mCE.

    wrong [n, K, S]: whether it is got wrong under corruption k at severity s. baseline [K]: mean error over the
    severities of the model that each corruption is set in relation to; None: the error itself is averaged.
    """
    errors = wrong.mean(axis=2, dtype=np.float64)
    return (errors if baseline is None else errors / np.asarray(baseline, dtype=np.float64)).mean(axis=1)


def relative_corruption_error(
    wrong: Bools, clean: Bools, baseline: npt.ArrayLike | None = None, baseline_clean: float = 0.0
) -> npt.NDArray[np.float64]:
    """The same for relative mCE, which takes how much the error grows from that on clean images, clean [n] wrong."""
    growth = wrong.mean(axis=2, dtype=np.float64) - clean[:, None]
    if baseline is not None:
        growth = growth / (np.asarray(baseline, dtype=np.float64) - baseline_clean)
    return growth.mean(axis=1)
