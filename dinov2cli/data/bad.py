"""What happens to images that cannot be read: skipped, counted, named, and too many of them stop the run."""

import logging

from dinov2cli.errors import InputError

logger = logging.getLogger(__name__)


class BadImage(Exception):
    """One image that cannot be used. Not for the user's eyes: loaders catch it, count it and name it.

    name: id or path of the image. reason: a few words, for example 'truncated file'.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both as args, so that it survives pickling between processes
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class BadImages:
    """Counter of unreadable images with the policy of DESIGN.md section 6.

    The share is taken of the whole set, not of the images seen so far: a damaged corner at the start of a sorted
    folder must not stop a run whose set as a whole is within the limit.
    """

    def __init__(self, max_fraction: float = 0.01, min_count: int = 10) -> None:
        self.max_fraction = max_fraction
        self.min_count = min_count
        self.reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Number of different images that could not be read."""
        return len(self.reasons)

    @property
    def names(self) -> list[str]:
        """Their names, in the order in which they were met."""
        return list(self.reasons)

    def add(self, name: str, reason: str) -> None:
        """Count one image; met again in a later epoch it is counted and logged once."""
        if name not in self.reasons:
            self.reasons[name] = reason
            logger.warning("skipped unreadable image %s: %s", name, reason)

    def check(self, total: int) -> None:
        """Stop when more than `min_count` images and more than `max_fraction` of `total` are unreadable, or all are.

        Raises:
            InputError: over the limit; the message names the first files.
        """
        nothing_left = self.count >= total > 0
        if not nothing_left and (self.count <= self.min_count or self.count <= self.max_fraction * total):
            return
        first = "; ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:3])
        if nothing_left:
            raise InputError(f"none of the {total} images can be read: {first}; give another set or repair it")
        raise InputError(
            f"{self.count} of {total} images cannot be read, the limit is {self.max_fraction:.1%}: {first}; "
            "repair or remove them, or raise max_bad_fraction with --set (data.max_bad_fraction for pretrain)"
        )
