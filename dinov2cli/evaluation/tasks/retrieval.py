"""`dinov2 eval retrieval`: images of the same object found among many, by the cosine of frozen features."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, MinLen

from dinov2cli.evaluation.tasks.interface import Figure, Judged, Panel, Task, setting

if TYPE_CHECKING:
    import numpy as np

    from dinov2cli.data.source import ImageSource
    from dinov2cli.evaluation.features import Features
    from dinov2cli.evaluation.retrieval.ranking import Level, LevelScores, Ranking
    from dinov2cli.evaluation.retrieval.setup import Setup
    from dinov2cli.evaluation.statistics import Statistic
    from dinov2cli.evaluation.tasks.trial import Trial

_PANELS, _SHOWN, _PIXELS = 4, 5, 160


@dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """Rank all images of --test by their likeness to each query, and see where those of the same object stand.

    Which belong together say the columns `group` and `is_query` (else the labels), or a file with lists of easy, hard
    and junk images for each query. Queries are images of --test, or those of another set (--queries NAME=D).
    """

    name: ClassVar[str] = "retrieval"
    train: ClassVar[bool] = False
    others: ClassVar[str | None] = "--queries"

    ks: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)] = setting(
        [1, 5, 10], "how many of the first images precision and recall look at"
    )
    pool: Literal["auto", "cls", "mean", "cls+mean"] = setting(
        "auto", "vector to compare: what the model is used by, class token, averaged patches, both", flag="--pool"
    )
    ground_truth: str | None = setting(
        None,
        "JSON file with easy, hard and junk images of each query (revisited Oxford and Paris)",
        flag="--ground-truth",
    )
    ap: Literal["trapezoid", "step"] = setting(
        "trapezoid", "area under precision over recall: as the codes of Oxford and Holidays have it, or scikit-learn"
    )

    def files(self) -> list[Path]:
        """The ground truth."""
        return [] if self.ground_truth is None else [Path(self.ground_truth)]

    def check(self, trial: "Trial") -> None:
        """Something must say which images belong together, and one query at least must have something to find."""
        import numpy as np

        from dinov2cli.evaluation.retrieval.setup import prepare

        queries = _queries(trial)
        every = np.arange(len(trial.test)), None if queries is None else np.arange(len(queries))
        prepare(trial.test, queries, self.ground_truth, *every)

    def collect(self, trial: "Trial") -> Any:
        """Features of the database and, where they are another set or parts of images, of the queries."""
        from dinov2cli.evaluation.features import view_of
        from dinov2cli.evaluation.retrieval.queries import BoxView, some_rows
        from dinov2cli.evaluation.retrieval.truth import read_ground_truth, rows_by_id, rows_of

        database, queries = trial.features(trial.test), _queries(trial)
        given = None if self.ground_truth is None else read_ground_truth(self.ground_truth)
        if given is None or not given.boxed:
            return database, None if queries is None else trial.features(queries)
        source = trial.test if queries is None else queries
        rows = rows_of([query.id for query in given.queries], rows_by_id(source.ids), path=given.path, data=source.spec)
        preprocess = trial.model.preprocess
        inner = view_of(preprocess)
        view = BoxView(inner, tuple(query.box for query in given.queries))
        # Unreadable images are counted once, with the set that they are part of.
        apart = replace(trial, bad={}, digests={})
        parts = apart.features(some_rows(source, rows.tolist()), view=view, keep=True)
        return database, replace(parts, index=rows[parts.index])

    def judge(self, trial: "Trial", collected: "tuple[Features, Features | None]") -> Judged:
        """Mean average precision and what the first images hold, at every level that the truth has."""
        from dinov2cli.evaluation.retrieval.ranking import ANY, LEVELS, level_scores, rank_rows
        from dinov2cli.evaluation.retrieval.setup import prepare

        queries, (database, asked) = _queries(trial), collected
        setup = prepare(trial.test, queries, self.ground_truth, database.index, None if asked is None else asked.index)
        among = _vectors(database, self.pool, f"{trial.test.spec}")[setup.database]
        if asked is None:
            vectors = database.pool(self.pool)[setup.queries]
        else:
            vectors = _vectors(asked, self.pool, "the queries")[setup.queries]
        with trial.progress("ranking", len(vectors), "queries") as advance:
            done = 0

            def tell(now: int, _total: int) -> None:
                nonlocal done
                advance(now - done)
                done = now

            ranking = rank_rows(vectors, among, setup.truths, device=trial.device, store=trial.store, progress=tell)
        levels = LEVELS if self.ground_truth is not None else (ANY,)
        scores = {level: level_scores(ranking, setup.truths, level, ks=self.ks, area=self.ap) for level in levels}
        figures = [figure for level in levels for figure in self._figures(level, scores[level], setup, ranking)]
        ids = trial.test.ids
        names = [ids[database.index[row]] for row in setup.database]
        units = (trial.test if queries is None else queries).ids
        units = [units[row] for row in setup.query_rows]
        return Judged(
            figures,
            units,
            predictions=_table(units, names, setup, ranking, scores),
            settings={"images": len(names), "queries": len(units), **setup.found},
            notes=setup.notes,
            panels=_panels(trial, queries, database.index[setup.database], setup, ranking, scores[levels[0]]),
        )

    def _figures(self, level: "Level", scores: "LevelScores", setup: "Setup", ranking: "Ranking") -> list[Figure]:
        from dinov2cli.evaluation.statistics import micro_average_precision

        end = f"_{level.name}" if level.name else ""
        figures = [Figure(f"mAP{end}", _over_asked(scores.average_precision), settings={"ap": self.ap})]
        for k, values in scores.precision_at.items():
            figures.append(Figure(f"mP@{k}{end}", _over_asked(values), settings={"k": k}))
        if not level.name:
            for k, values in scores.found_at.items():
                figures.append(Figure(f"recall@{k}", _over_asked(values), settings={"k": k}))
        if setup.open_ended:
            correct, answerable = setup.first_right(ranking)
            found = micro_average_precision(ranking.similarities[:, 0], correct, answerable)
            figures.append(Figure("GAP", found, settings={"confidence_of": "cosine of the nearest image"}))
        return figures


def _queries(trial: "Trial") -> "ImageSource | None":
    """The set of queries, where they are no images of the test set. Raises UserError for several."""
    from dinov2cli.errors import UserError

    if len(trial.others) > 1:
        raise UserError(
            f"--queries was given {len(trial.others)} times; expected one set: run the command once for each"
        )
    return next(iter(trial.others.values()), None)


def _vectors(features: "Features", pool: str, name: str) -> "np.ndarray":
    import torch

    from dinov2cli.evaluation.scores import require_finite

    vectors = features.pool(pool)
    require_finite(torch.from_numpy(vectors), name)
    return vectors


def _over_asked(values: "np.ndarray") -> "Statistic":
    """Mean over the queries with something to be found; the others [NaN] stay units without a say."""
    import numpy as np

    from dinov2cli.evaluation.statistics import mean, ratio

    asked = ~np.isnan(values)
    return mean(values) if asked.all() else ratio(np.where(asked, values, 0), asked)


def _table(
    units: list[str], names: list[str], setup: "Setup", ranking: "Ranking", scores: "dict[Level, LevelScores]"
) -> Any:
    """One row for each query: average precision, and the first images with their cosines and whether each is right."""
    import numpy as np
    import pyarrow as pa

    columns: dict[str, Any] = {"id": pa.array(units, pa.string())}
    for level, found in scores.items():
        name = f"ap_{level.name}" if level.name else "ap"
        columns[name] = pa.array(found.average_precision, from_pandas=True)
    near = [rows[rows >= 0] for rows in ranking.nearest]
    right = [np.isin(rows, truth.rows) for rows, truth in zip(near, setup.truths, strict=True)]
    columns["correct"] = pa.array([bool(len(hits) and hits[0]) for hits in right])
    columns["confidence"] = pa.array(ranking.similarities[:, 0].astype(np.float64))
    columns["neighbours"] = pa.array([[names[row] for row in rows] for rows in near], pa.list_(pa.string()))
    columns["similarities"] = pa.array(
        [values[: len(rows)] for values, rows in zip(ranking.similarities, near, strict=True)], pa.list_(pa.float32())
    )
    columns["relevant"] = pa.array([hits.tolist() for hits in right], pa.list_(pa.bool_()))
    return pa.table(columns)


def _panels(
    trial: "Trial",
    queries: "ImageSource | None",
    database_rows: "np.ndarray",
    setup: "Setup",
    ranking: "Ranking",
    scores: "LevelScores",
) -> list[Panel]:
    """The queries with the lowest average precision, each with the images that were ranked first."""
    import numpy as np

    from dinov2cli.data.bad import BadImage
    from dinov2cli.data.decode import decode_image
    from dinov2cli.data.loader import CentreView
    from dinov2cli.evaluation.retrieval.queries import boxed

    shown = CentreView(_PIXELS, _PIXELS)

    def picture(source: "ImageSource", row: int, box: Any = None) -> "np.ndarray":
        pixels = boxed(decode_image(source.read(row), name=source.name(row)), box)
        return shown(pixels, row).permute(1, 2, 0).numpy()

    order = np.argsort(scores.average_precision, kind="stable")
    panels = []
    for number in order[~np.isnan(scores.average_precision[order])][:_PANELS].tolist():
        truth, near = setup.truths[number], ranking.nearest[number]
        near = near[near >= 0][:_SHOWN]
        own = trial.test if queries is None else queries
        try:
            images = [picture(own, int(setup.query_rows[number]), setup.boxes[number])]
            images += [picture(trial.test, int(database_rows[row])) for row in near]
        except BadImage:  # gone since it was read for its features
            continue
        cosines = ranking.similarities[number]
        labels = ["query"]
        labels += [
            f"{'right' if row in truth.rows else 'wrong'}, {cosine:.2f}"
            for row, cosine in zip(near, cosines[: len(near)], strict=True)
        ]
        found = scores.average_precision[number]
        panels.append(
            Panel(f"{own.name(int(setup.query_rows[number]))}: average precision {found:.3f}", images, labels)
        )
    return panels
