"""Loading and merging of recipes: defaults < recipe < --set < flags. The only reader of YAML.

Every problem of a config is found and reported at once, with where it came from and the nearest known key.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dinov2cli.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
Config = TypeVar("Config", bound=BaseModel)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the program, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def launch_files() -> dict[str, Path]:
    """Return the files that start runs over many processes, by name: accelerate/… configs and cluster/… scripts."""
    found = [*RECIPES.glob("accelerate/*.yaml"), *RECIPES.glob("cluster/*.sh")]
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(found)}


def recipe_path(name: str) -> Path:
    """Return the file of a recipe given by name or by path; UserError with the nearest names when there is none."""
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"--config {name} is neither a recipe nor a file; {hint}recipes: {', '.join(recipe_names())} "
        "(`dinov2 recipes ls`)"
    )


def load_config(
    model: type[Config],
    *,
    recipe: str | None = None,
    option: str = "--config",
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    others: Mapping[str, type[BaseModel]] | None = None,
) -> Config:
    """Return the validated config of `model` from a recipe, `a.b=c` strings and flags (dotted keys; None = not given).

    option: by which the recipe was given, for messages; with another than --config it is a file, not a name. others:
    configs of commands whose recipes may be given by mistake; one that only such a command knows is told so.
    Raises UserError listing every unknown key, bad value and malformed --set together.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    known = dict(dotted_keys(model))
    if recipe is not None:
        content = _read_yaml(recipe, option)
        _check_command(recipe, option, content, known, others or {})
        for key, value in _flatten(content, known):
            _place(values, key, value)
            origin[key] = f"{'recipe' if option == '--config' else 'file'} {recipe}"
    for text in sets:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {text}: expected KEY=VALUE, as --set optim.lr=0.001")
            continue
        try:
            value = _number(yaml.safe_load(raw))
        except yaml.YAMLError:
            problems.append(f"--set {text}: the value is not YAML, quote it")
            continue
        for name, leaf in _flatten({key.strip(): value}, known):
            _place(values, name, leaf)
            origin[name] = "--set"
    for key, value in (flags or {}).items():
        if value is not None:
            _place(values, key, value)
            origin[key] = "flag"
    _drop_replaced(values, origin, getattr(model, "alternatives", ()))
    _drop_details(values, origin, getattr(model, "details", {}))
    problems += [_unknown(key, origin[key], known) for key in origin if key not in known]
    for key in origin:
        if key not in known:
            _remove(values, key)
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        problems += [_bad_value(detail, origin) for detail in error.errors()]
    if problems:
        count = f"{len(problems)} config error{'s' if len(problems) > 1 else ''}"
        raise UserError("\n  ".join([f"{count}:", *problems]) if len(problems) > 1 else f"{count}: {problems[0]}")
    return config


def command_of(recipe: str, configs: Mapping[str, type[BaseModel]]) -> str:
    """Return the command that a recipe is for: the first of those (by name) that know most of its keys."""
    content = _read_yaml(recipe, "--config")
    return min(configs, key=lambda name: len(_unknown_keys(content, dict(dotted_keys(configs[name])))))


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, default) for every leaf of a config model."""
    for name, info in model.model_fields.items():
        section = _section(info.annotation)
        if section is not None:
            yield from dotted_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info.default


def to_yaml(config: BaseModel) -> str:
    """Return a config as YAML, in the order of its fields; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _check_command(
    recipe: str,
    option: str,
    content: Mapping[str, Any],
    known: Mapping[str, Any],
    others: Mapping[str, type[BaseModel]],
) -> None:
    """UserError for a recipe of another command: it has keys that are unknown here, and all are known there."""
    unknown = _unknown_keys(content, known)
    for command, config in others.items() if unknown else ():
        if not _unknown_keys(content, dict(dotted_keys(config))):
            raise UserError(
                f"{option} {recipe}: is a recipe of `dinov2 {command}` ({unknown[0]} is no setting of this command); "
                "choose another one (`dinov2 recipes ls`)"
            )


def _unknown_keys(content: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    return [key for key, _ in _flatten(content, known) if key not in known]


def _section(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is list:  # a list of sections is one value
        return None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _read_yaml(name: str, option: str) -> dict[str, Any]:
    path = recipe_path(name) if option == "--config" else Path(name)
    if not path.is_file():
        raise UserError(f"{option} {name}: there is no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{option} {path} is not YAML{where}; see `dinov2 recipes show tiny-cpu` for the form"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{option} {path} holds a {type(content).__name__}, expected keys with values")
    return content


def _flatten(content: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted leaves; a mapping is descended into unless its key is itself a known leaf."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known and value:
            yield from _flatten(value, known, f"{key}.")
        elif value == {} and key not in known:
            continue
        else:
            yield key, _number(value)


def _number(value: Any) -> Any:
    """Read `1e-3` as the number it is meant to be: YAML 1.1 wants `1.0e-3` and takes the short form for text."""
    if isinstance(value, str) and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _place(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            child = values[parent] = {}
        values = child
    values[last] = value


def _drop_replaced(values: dict[str, Any], origin: dict[str, str], groups: Sequence[Sequence[str]]) -> None:
    """Of keys that are alternatives keep those of the strongest origin: flags, then --set, then the recipe."""
    strength = {"flag": 2, "--set": 1}
    for group in groups:
        given = {key: strength.get(origin[key], 0) for key in group if key in origin}
        for key, rank in given.items():
            if rank < max(given.values()):
                _remove(values, key)
                del origin[key]


def _drop_details(values: dict[str, Any], origin: dict[str, str], details: Mapping[str, Sequence[str]]) -> None:
    """Where a key of `details` was given on the command line, forget what the recipe says of its details: they belong
    to the recipe's own value."""
    given = ("flag", "--set")
    for key, belonging in details.items():
        if origin.get(key) not in given:
            continue
        for other in belonging:
            if other in origin and origin[other] not in given:
                _remove(values, other)
                del origin[other]


def _remove(values: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.get(parent, {})
        if not isinstance(values, dict):
            return
    values.pop(last, None)


def _unknown(key: str, origin: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # the right last word in the wrong section
        near = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    inside = [k for k in known if k.startswith(f"{key}.")]
    if inside:
        return f"{key} ({origin}): is a section, expected one of its keys, as {inside[0]}"
    return f"{key} ({origin}): unknown key" + (f", did you mean {near[0]}?" if near else "")


def _bad_value(detail: Any, origin: Mapping[str, str]) -> str:
    location = [str(part) for part in detail["loc"]]
    key = next((k for n in range(len(location), 0, -1) if (k := ".".join(location[:n])) in origin), ".".join(location))
    inner = ".".join(location)[len(key) :] if any(part.isdigit() for part in location) else ""  # as phases.0.steps
    expected = detail["msg"].removeprefix("Value error, ")
    expected = expected[:1].lower() + expected[1:]
    if not key:
        return expected
    found = detail["input"]
    return f"{key}{inner} ({origin.get(key, 'default')}): found {found!r}, {expected.replace('input should', 'should')}"
