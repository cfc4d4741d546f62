"""Fine-tuning end to end: backbone and linear head learn the labels of a training set together.

The recipe is that of today's vision transformers (DeiT: Touvron et al. 2021, arXiv 2012.12877; MAE: He et al. 2021,
arXiv 2111.06377, appendix A.1): AdamW, learning rates that fall from layer to layer, cosine schedule with warm-up,
mixup and CutMix with smoothed targets, stochastic depth, a moving average of the weights.

Every step is a function of (seed, step) and of the images of the whole batch: a run gives the same weights, but for the
rounding of sums, however many processes share a batch and in however many passes each computes its part; and the same
to the last bit where it was killed and continued.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dinov2cli.data.bad import BadImages
from dinov2cli.data.source import ImageSource
from dinov2cli.device import autocast
from dinov2cli.distributed import ALONE, Ranks
from dinov2cli.errors import UserError, WorkError
from dinov2cli.evaluation.finetuning import state as states
from dinov2cli.evaluation.finetuning.mixing import Mixing, mixed_images, soft_cross_entropy
from dinov2cli.evaluation.finetuning.model import (
    Classifier,
    average,
    average_decay,
    layered_adamw,
    make_moments,
    moments,
    set_rates,
    trained,
)
from dinov2cli.evaluation.finetuning.views import Look, Seen, Views
from dinov2cli.models.depth import Share
from dinov2cli.search.blocks import Stage
from dinov2cli.train.optim import clip_gradients
from dinov2cli.train.schedules import warmup_cosine

_CHECK = 10  # steps between looks at the loss, each of which makes a GPU wait
_WORD = (1 << 63) - 1

Which = Literal["raw", "ema"]
"""The weights that training moves, or their moving average."""


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. `batch` images a step over all ranks, an even number on each; `lr` is the peak for that batch.

    `warmup` is a share of all steps. `clip` is the largest norm of the gradient, `ema` the decay of the average of the
    weights (0: none).
    """

    look: Look
    mixing: Mixing = field(default_factory=Mixing)
    epochs: int = 50
    batch: int = 128
    lr: float = 2.5e-4
    min_lr: float = 1e-6
    warmup: float = 0.1
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    clip: float = 3.0
    ema: float = 0.9999

    def steps(self, images: int) -> int:
        """Steps of the whole run over so many images."""
        return self.epoch_end(self.epochs, images)

    def epoch_end(self, epoch: int, images: int) -> int:
        """Steps after which every image was seen `epoch` times."""
        return math.ceil(epoch * images / self.batch)


def fitting_batch(batch: int, images: int, world_size: int) -> int:
    """`batch`, or where there are fewer images as many as can be dealt out in pairs.

    Raises UserError for a batch that does not give every rank an even number of images.
    """
    pair = 2 * world_size
    if batch % pair or batch < pair:
        near = max(batch // pair * pair, pair)
        raise UserError(
            f"batch: {batch} images on {world_size} process{'es' if world_size > 1 else ''} found, expected a multiple "
            f"of {pair}, for images are mixed in pairs; use {near} or {near + pair}"
        )
    return batch if batch <= images else max(images // pair * pair, pair)


def pass_size(own: int, most: int) -> int:
    """Images of one pass: the largest even divisor of `own`, the images of this rank, that is at most `most` (or 2)."""
    return max(size for size in range(2, own + 1, 2) if own % size == 0 and (size <= most or size == 2))


class FineTuning:
    """One run. `course` tells how far it is, `averages` are the averaged weights ({} without).

    Args:
        model: the classifier, on its device; its weights are moved.
        source, labels: training images and their classes, int64 [len(source)] in 0..C-1.
        most: images of one pass through the network; more are accumulated.
        bad: counts unreadable images.
    """

    def __init__(
        self,
        model: Classifier,
        source: ImageSource,
        labels: np.ndarray,
        recipe: Recipe,
        *,
        seed: int,
        precision: str = "fp32",
        most: int = 64,
        workers: int = 0,
        bad: BadImages | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        own = recipe.batch // ranks.world_size
        self.model, self.recipe, self.ranks = model, recipe, ranks
        self.total, self.images = recipe.steps(len(source)), len(source)
        self.course, self.resumed = states.Course(), 0
        self.device = model.head.weight.device
        self.weights = trained(model)
        self.averages = {n: w.detach().clone() for n, w in self.weights.items()} if recipe.ema > 0 else {}
        self.best: dict[str, Tensor] = {}
        self._optimizer = layered_adamw(model, layer_decay=recipe.layer_decay)
        self._labels = torch.from_numpy(np.asarray(labels, dtype=np.int64))
        self._seed, self._precision, self._pass = seed, precision, pass_size(own, most)
        self._parts = own // self._pass
        self._views = Views(
            source,
            recipe.look,
            batch=own,
            seed=seed,
            workers=workers,
            bad=BadImages() if bad is None else bad,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        self._pending: list[Tensor] = []

    def run(
        self,
        *,
        stage: Stage | None = None,
        every: int = 100,
        held_out: Callable[[dict[str, Tensor]], float] | None = None,
        which: Which = "raw",
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Train to the end, from what `stage` holds, saving there every `every` steps and last.

        `held_out` gives the accuracy of weights on images held out; after every epoch it is asked about the weights
        `which`, and those of the best epoch (the first of equal ones) are the model's in the end.
        Raises WorkError for a loss that is not finite, InputError for too many unreadable images.
        """
        self._restore(stage)
        if advance is not None:
            advance(self.course.step)
        ends = {self.recipe.epoch_end(epoch, self.images) for epoch in range(1, self.recipe.epochs + 1)}
        self.model.train()
        batches = self._views.batches(self.course.step)
        while self.course.step < self.total:
            self._step(self._next(batches))
            step = self.course.step
            if step in ends or step % every == 0 or step % _CHECK == 0:
                self._look_at_losses()
            if step in ends and held_out is not None:
                self._compare(held_out, which)
            if step % every == 0 or step == self.total:
                states.save(stage, self.ranks, self.course, self._tensors())
            if advance is not None:
                advance(1)
        batches.close()  # type: ignore[attr-defined]
        self._take_best()

    def losses(self) -> list[float]:
        """Mean loss of every epoch that is complete."""
        ends = [self.recipe.epoch_end(epoch, self.images) for epoch in range(self.recipe.epochs + 1)]
        done = [(a, b) for a, b in pairwise(ends) if a < b <= len(self.course.losses)]
        return [float(np.mean(self.course.losses[first:last])) for first, last in done]

    def _next(self, batches: Iterator[Seen]) -> Seen:
        # Together: what one rank cannot read all must hear of, or they wait for its gradients.
        return self.ranks.together(lambda: next(batches))

    def _step(self, seen: Seen) -> None:
        recipe, step = self.recipe, self.course.step
        mix = recipe.mixing.draw(recipe.look.size, recipe.look.size, _random(self._seed, step, 0))
        loss = torch.zeros((), device=self.device)
        self._optimizer.zero_grad(set_to_none=True)
        for number in range(self._parts):
            part = slice(number * self._pass, (number + 1) * self._pass)
            images = mixed_images(self._views.coloured(seen, part, self.device), mix)
            labels = self._labels[torch.from_numpy(seen.rows[part])].to(self.device)
            targets = recipe.mixing.targets(labels, self.model.head.out_features, mix)
            losses = soft_cross_entropy(self._logits(images, number), targets)
            # Over the whole batch, so that sums over passes and ranks are its mean.
            mean = losses.sum() / recipe.batch
            mean.backward()
            loss += mean.detach()
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        states.sum_over_ranks([*gradients, loss], self.ranks)
        clip_gradients({"all": self.weights.values()}, recipe.clip)
        lr = warmup_cosine(step, self.total, base=recipe.lr, final=recipe.min_lr, warmup=recipe.warmup)
        set_rates(self._optimizer, lr, recipe.weight_decay)
        self._optimizer.step()
        self.course.step = step + 1
        if self.averages:
            average(self.averages.values(), self.weights.values(), average_decay(recipe.ema, step + 1))
        self._pending.append(loss)

    def _logits(self, images: Tensor, number: int) -> Tensor:
        """Logits of pass `number` of this rank: one of world_size x parts equal shares of the batch."""
        share = Share(self.ranks.rank * self._parts + number, self.ranks.world_size * self._parts, self._pass)
        # Drawn anew for every pass, so that all draw alike for the whole batch.
        generator = torch.Generator().manual_seed(_number(self._seed, self.course.step, 1))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), autocast(self.device, self._precision):
            # Encoders that are not ours may drop what they like, out of torch's common generator.
            torch.manual_seed(_number(self._seed, self.course.step, 2 + share.rank))
            logits: Tensor = self.model(images, generator=generator, share=share)
        return logits

    def _look_at_losses(self) -> None:
        if self._pending:
            self.course.losses += torch.stack(self._pending).double().tolist()
            self._pending = []

        def check() -> None:
            wrong = next((i for i, loss in enumerate(self.course.losses) if not math.isfinite(loss)), None)
            if wrong is not None:
                raise WorkError(
                    f"the loss of fine-tuning is {self.course.losses[wrong]} at step {wrong + 1} of {self.total}: "
                    f"lower lr ({self.recipe.lr:g} at batch {self.recipe.batch}) or clip ({self.recipe.clip:g}), or "
                    f"lengthen warmup ({self.recipe.warmup:g}), or train with --precision fp32"
                )

        self.ranks.together(check)

    def _compare(self, held_out: Callable[[dict[str, Tensor]], float], which: Which) -> None:
        weights = self.averages if which == "ema" else self.weights
        accuracy = held_out(weights)
        if not self.course.held_out or accuracy > max(self.course.held_out):
            self.best = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
            self.course.best = len(self.course.held_out) + 1
        self.course.held_out.append(accuracy)

    @torch.no_grad()
    def _take_best(self) -> None:
        if not self.course.best:
            return
        for name, weight in self.weights.items():
            weight.copy_(self.best[name])
        self.best, self.averages = {}, {}

    def _tensors(self) -> dict[str, Tensor]:
        """All that the rest of the run depends on, by name."""
        groups = {"weights": self.weights, "average": self.averages, "best": self.best}
        found = {f"{kind}.{name}": tensor for kind, group in groups.items() for name, tensor in group.items()}
        return found | moments(self._optimizer)

    def _restore(self, stage: Stage | None) -> None:
        saved = states.load(stage, self.ranks)
        if saved is None:
            return
        self.course, self.resumed = saved.course, saved.course.step
        if self.course.best:
            self.best = {name: torch.empty_like(weight, device="cpu") for name, weight in self.weights.items()}
        moved = [name.removeprefix("first.") for name in saved.names if name.startswith("first.")]
        make_moments(self._optimizer, moved, self.course.step)
        saved.fill(self._tensors())


def _number(seed: int, step: int, purpose: int) -> int:
    """A seed that belongs to these three numbers."""
    return int(np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0]) & _WORD


def _random(seed: int, step: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, purpose])))
