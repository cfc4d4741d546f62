"""The tasks there are, by name; and tasks in files of the user's own."""

import importlib
import importlib.util
import sys
from pathlib import Path

from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.tasks.interface import Task

_CLASSES = {
    "knn": "Knn",
    "linear": "Linear",
    "logreg": "Logreg",
    "finetune": "Finetune",
    "retrieval": "Retrieval",
    "segmentation": "Segmentation",
    "depth": "Depth",
    "robustness": "Robustness",
}
TASKS = tuple(_CLASSES)
"""Names of the tasks that come with the program, each in the file of its name."""


def find_task(name: str) -> type[Task]:
    """The task of this name, or the one in the Python file of this name.

    Raises UserError for a name that does not exist, InputError for a file without exactly one task.
    """
    if name in _CLASSES:
        found: type[Task] = getattr(importlib.import_module(f"dinov2cli.evaluation.tasks.{name}"), _CLASSES[name])
        return found
    if name.endswith(".py"):
        return _in_file(Path(name).expanduser())
    raise UserError(f"task {name!r} is not known: expected one of {', '.join(TASKS)}, or a Python file with a Task")


def _in_file(path: Path) -> type[Task]:
    if not path.is_file():
        raise InputError(f"task {path}: there is no such file")
    # Under a name that no module has; dataclasses look their module up by it.
    name = f"dinov2_task_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file may raise
        raise InputError(f"task {path} cannot be imported ({type(error).__name__}: {error})") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == name
    ]
    if len(found) != 1:
        raise InputError(
            f"task {path} holds {len(found)} subclasses of dinov2cli.evaluation.tasks.interface.Task, expected one"
        )
    return found[0]
