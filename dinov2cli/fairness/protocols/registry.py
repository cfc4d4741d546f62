"""The studies there are, by name."""

import importlib

from dinov2cli.evaluation.tasks.interface import Task

_CLASSES = {"geo": "Geo", "people": "People", "audit": "Audit"}
PROTOCOLS = tuple(_CLASSES)
"""Names of the studies, each in the file of its name."""


def find_protocol(name: str) -> type[Task]:
    """The study of this name. Raises KeyError for another."""
    found: type[Task] = getattr(importlib.import_module(f"dinov2cli.fairness.protocols.{name}"), _CLASSES[name])
    return found
