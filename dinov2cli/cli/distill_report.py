"""Teacher and students of a finished distillation, measured beside each other for the run's page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2cli.artifacts.output import Output
from dinov2cli.cli.talk import Talk
from dinov2cli.errors import InputError, UserError, WorkError

if TYPE_CHECKING:
    import torch

    from dinov2cli.data.source import ImageSource
    from dinov2cli.evaluation.side_by_side import Estimate, Looked, Seer
    from dinov2cli.models.load import LoadedModel
    from dinov2cli.models.preprocess import Preprocess
    from dinov2cli.report.side_by_side import ModelFigures, SideBySide

COMPARISON_FILE, COMPARISON_MAPS = "comparison.json", "comparison.svg"
TEACHER, STUDENT = "teacher", "student"
_SHOWN = 6  # images with maps
_EXPLAINED = (InputError, UserError, WorkError)


@dataclass
class _Side:
    """One model of the comparison, and what is found of it."""

    label: str
    spec: str
    loaded: "LoadedModel"
    figures: dict[str, "Estimate"] = field(default_factory=dict)
    changes: dict[str, "Estimate"] = field(default_factory=dict)
    correct: dict[str, Any] = field(default_factory=dict)
    speed: "Estimate | None" = None
    memory: int | None = None

    @property
    def network(self) -> Any:
        return self.loaded.encoder

    @property
    def size(self) -> int:
        return self.loaded.preprocess.crop

    @property
    def grid(self) -> int:
        return self.size // self.network.patch_size


def check_comparison(source: "ImageSource", test: str | None) -> None:
    """Raise InputError, before a run begins, for test images that could not be compared on at its end: not there,
    without labels, or of classes that the training images lack."""
    from dinov2cli.data.source import open_source
    from dinov2cli.evaluation.side_by_side import check_test

    if test is not None:
        check_test(source, open_source(test))


def write_side_by_side(
    out: Output,
    talk: Talk,
    teacher_spec: str,
    students: Mapping[str, Path],
    source: "ImageSource",
    *,
    images: int = 2000,
    test: str | None = None,
    seed: int,
    precision: str,
    device: "torch.device",
    teacher_size: int | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """Measure teacher and students on the same images, write `comparison.json` and `comparison.svg` (PCA maps), and
    give back every number by name (`SideBySide.metrics`). `run_page` shows both files.

    students: name -> export; a single one may have the name "". images: drawn from `source`, and from `test`, at most.
    teacher_size: pixels of the images that the teacher sees; by default those of the students where it can take them.
    What cannot be measured is left out, with the reason in the notes. Raises InputError and UserError for a model that
    cannot be opened, and InputError where no image can be read.
    """
    from dinov2cli.data.source import open_source
    from dinov2cli.report.side_by_side import SideBySide, protocol

    opened = None if test is None else open_source(test)
    notes: list[str] = []
    sides = _open(teacher_spec, students, device, teacher_size, notes)
    seen = _accuracy(sides, source, opened, notes, talk, images, seed, precision, workers)
    batch = _forward_passes(sides, notes, precision)
    maps = _maps(sides, source if opened is None else opened, precision, notes)
    models = [_figures_of(side) for side in sides]
    judged = None if opened is None else (opened.spec, seen[1])
    said = protocol(models, train=(source.spec, seen[0]), test=judged, batch=batch, where=_place(device, precision))
    found = SideBySide(models, batch, said, notes)
    if maps is not None:
        out.write_text(COMPARISON_MAPS, maps)
    out.write_json(COMPARISON_FILE, found.to_json())
    return found.metrics()


def read_side_by_side(path: Path) -> "tuple[SideBySide, str | None] | None":
    """What `write_side_by_side` left in a run directory, and the maps; None where it has not been there yet.

    Raises InputError for a file that does not hold a comparison."""
    import json

    from dinov2cli.report.side_by_side import SideBySide

    file, maps = path / COMPARISON_FILE, path / COMPARISON_MAPS
    if not file.is_file():
        return None
    try:
        found = SideBySide.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (InputError, ValueError) as error:
        raise InputError(f"{file}: {error}") from None
    return found, maps.read_text(encoding="utf-8") if maps.is_file() else None


def _open(
    teacher_spec: str,
    students: Mapping[str, Path],
    device: "torch.device",
    teacher_size: int | None,
    notes: list[str],
) -> list[_Side]:
    """The teacher and the students, each at the size that its images have here."""
    from dinov2cli.models.load import load_model

    found = []
    for name, path in students.items():
        label = f"{STUDENT} {name}" if name == TEACHER else name or STUDENT
        found.append(_Side(label, str(path), load_model(path, device=device)))
    teacher = load_model(teacher_spec, device=device, img_size=teacher_size)
    common = max(side.size for side in found)
    own = teacher.preprocess.crop
    if teacher_size is None and own != common:
        teacher = _at(teacher, common)
    if teacher.preprocess.crop != own:
        _note(notes, f"The teacher sees images of {common} px, as the students do; its own size is {own} px.")
    return [_Side(TEACHER, teacher_spec, teacher), *found]


def _at(model: "LoadedModel", size: int) -> "LoadedModel":
    """The model at a size in pixels, or as it was where it does not take that."""
    from dinov2cli.models.encoder import Encoder

    network = model.encoder
    try:
        preprocess = model.preprocess.with_crop(size, network.patch_size)
        if isinstance(network, Encoder):
            network.check_size(size)
    except UserError:
        return model
    return replace(model, preprocess=preprocess)


def _accuracy(
    sides: list[_Side],
    source: "ImageSource",
    test: "ImageSource | None",
    notes: list[str],
    talk: Talk,
    images: int,
    seed: int,
    precision: str,
    workers: int,
) -> tuple[int, int]:
    """Fill in k-NN, linear probe and agreement; returns how many images were read of `source` and of `test`."""
    from dinov2cli.evaluation.side_by_side import Estimate, draw, look

    seers, framed = _seers(sides)
    rows = draw(source, images, seed=seed)
    other = rows[:0] if test is None else draw(test, images, seed=seed)
    settings: dict[str, Any] = {"seed": seed, "precision": precision, "workers": workers}
    with talk.progress("teacher and students side by side", (len(rows) + len(other)) * len(seers)) as advance:
        train = look(seers, source, rows, advance=advance, **settings)
        judged = train if test is None else look(seers, test, other, advance=advance, **settings)
    for side, own, answers in zip(sides, train, judged, strict=False):
        _answers(side, own, answers, source, test, seed, notes)
    for key, right in sides[0].correct.items():
        for side in sides[1:]:
            if key in side.correct:
                side.changes[key] = Estimate.change(right, side.correct[key], seed=seed)
    _tokens(sides, judged, framed, seed, notes)
    return len(train[0].index), 0 if test is None else len(judged[0].index)


def _seers(sides: list[_Side]) -> tuple[list["Seer"], list[int]]:
    """How each model looks, then the teacher once more for every other framing; for each student, which of these looks
    of the teacher its patches are compared with."""
    from dinov2cli.evaluation.side_by_side import Seer, framed

    teacher, *students = sides
    own = teacher.loaded.preprocess
    ways = [framed(own, side.loaded.preprocess) for side in students]
    others = [way for way in dict.fromkeys(ways) if way != own]

    def shown(way: "Preprocess") -> "Seer":
        return Seer(teacher.network, way, frozenset(s.grid for s, w in zip(students, ways, strict=True) if w == way))

    looks = [Seer(side.network, side.loaded.preprocess, frozenset([side.grid])) for side in students]
    place = {own: 0} | {way: len(sides) + number for number, way in enumerate(others)}
    return [shown(own), *looks, *map(shown, others)], [place[way] for way in ways]


def _answers(
    side: _Side,
    train: "Looked",
    test: "Looked",
    source: "ImageSource",
    test_source: "ImageSource | None",
    seed: int,
    notes: list[str],
) -> None:
    """k-NN and linear probe of one model, where there are labels."""
    from dinov2cli.evaluation.side_by_side import Estimate, knn_correct, labelled_split, linear_correct

    device = side.network.device
    try:
        split = labelled_split(source, train.index, test_source, test.index)
    except InputError as error:
        _note(notes, f"k-NN and linear probe are left out: {error}.")
        return
    for note in split.notes:
        _note(notes, f"{note}.")
    measures: dict[str, Callable[[], Any]] = {
        "knn": lambda: knn_correct(train, test, split, device=device),
        "linear": lambda: linear_correct(train, test, split, seed=seed, device=device),
    }
    for key, measure in measures.items():
        try:
            right = measure()
        except _EXPLAINED as error:
            _note(notes, f"{side.label}: {key} is left out: {error}.")
            continue
        side.correct[key] = right.astype(float)
        side.figures[key] = Estimate.of(side.correct[key], seed=seed)


def _tokens(sides: list[_Side], looked: list["Looked"], framed: list[int], seed: int, notes: list[str]) -> None:
    """Agreement of each student's tokens with the teacher's."""
    from dinov2cli.evaluation.side_by_side import token_figures

    for number, (side, way) in enumerate(zip(sides[1:], framed, strict=True), start=1):
        try:
            side.figures.update(token_figures(looked[number], looked[way], side.grid, seed=seed))
        except _EXPLAINED as error:
            _note(notes, f"{side.label}: agreement of tokens is left out: {error}.")


def _forward_passes(sides: list[_Side], notes: list[str], precision: str) -> int:
    """Fill in speed and memory; returns the images of a pass."""
    from dinov2cli.bench.forward import batch_for, device_memory, forward_seconds, host_memory
    from dinov2cli.bench.peak import run_in_child
    from dinov2cli.evaluation.side_by_side import Estimate

    device = sides[0].network.device
    batch = batch_for([(side.network, side.size) for side in sides], device)
    seconds = forward_seconds({s.label: (s.network, s.size) for s in sides}, batch, precision=precision)
    for side in sides:
        quick, *_, slow = ordered = sorted(seconds[side.label])
        side.speed = Estimate(batch / ordered[len(ordered) // 2], batch / slow, batch / quick, len(ordered))
    if device.type == "cuda":
        needed = [device_memory(side.network, batch, side.size, precision=precision) for side in sides]
    else:
        try:
            needed = run_in_child(host_memory, [(side.spec, side.size) for side in sides], batch, precision)
        except RuntimeError as error:
            _note(notes, f"memory is left out: {error}")
            return batch
    if needed is None:
        _note(notes, "memory is left out: this system does not tell what a part of a process's life needed at most")
        return batch
    for side, memory in zip(sides, needed, strict=True):
        side.memory = memory
    return batch


def _maps(sides: list[_Side], source: "ImageSource", precision: str, notes: list[str]) -> str | None:
    """The same images with the maps of every model, as SVG; None where there is nothing to show."""
    from dinov2cli.device import autocast
    from dinov2cli.report.examples import patch_maps
    from dinov2cli.report.pca import pca_maps

    pictures, tokens = None, {}
    for side in sides:
        try:
            with autocast(side.network.device, precision):
                found = patch_maps(side.network, side.loaded.preprocess, source, count=_SHOWN)
        except UserError as error:
            _note(notes, f"{side.label}: no maps, {error}.")
            continue
        if found is not None:
            pictures, tokens[side.label] = found if pictures is None else (pictures, found[1])
    return None if pictures is None else pca_maps(pictures, tokens, size=150, images_per_row=1)


def _place(device: "torch.device", precision: str) -> str:
    import torch

    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"
    return f"in {precision} on {name}"


def _figures_of(side: _Side) -> "ModelFigures":
    from dinov2cli.bench.forward import parameters_of
    from dinov2cli.models.registry import name_of
    from dinov2cli.models.vit import VisionTransformer
    from dinov2cli.report.side_by_side import ModelFigures

    net = side.network
    return ModelFigures(
        label=side.label,
        # A student's directory is called as all are; what it is tells more.
        model=side.loaded.name if side.label == TEACHER or not isinstance(net, VisionTransformer) else name_of(net),
        parameters=parameters_of(net),
        embed_dim=net.embed_dim,
        depth=net.depth,
        patch_size=net.patch_size,
        size=side.size,
        images_per_s=side.speed,
        memory=side.memory,
        figures=side.figures,
        changes=side.changes,
    )


def _note(notes: list[str], text: str) -> None:
    """Add a sentence once, with one full stop."""
    text = text.rstrip(".") + "."
    text = text[:1].upper() + text[1:]
    if text not in notes:
        notes.append(text)
