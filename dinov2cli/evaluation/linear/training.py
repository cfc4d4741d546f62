"""All heads of the linear probe in one training: what several heads read is multiplied once for all of them.

The inputs of the heads are nested. The class token of the last block is read by all, that of earlier blocks by those of
more blocks, the averaged patches by half of them. So the inputs are cut into these pieces, each multiplied once with
one matrix of all the heads that read it: as many operations as one product per head, in fewer and larger products.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2cli.evaluation.linear.grid import Head
from dinov2cli.evaluation.scores import require_finite
from dinov2cli.search.blocks import Arrays

MOMENTUM = 0.9
RATE_BATCH = 256
"""A learning rate is given for so many images per step, and scaled to the batch."""
_INIT_STD = 0.01
_SCORES = 1 << 24  # logits of all heads held at once when judging


@dataclass(frozen=True)
class Inputs:
    """Features as the heads read them: class tokens [n, L * D] of the last L blocks, oldest first, and averaged patches
    [n, D] of the last block, or None. float32."""

    tokens: Tensor
    patches: Tensor | None
    dim: int

    @staticmethod
    def of(
        class_tokens: np.ndarray | Tensor,
        averaged_patches: np.ndarray | Tensor | None,
        name: str,
        device: torch.device | str = "cpu",
    ) -> "Inputs":
        """From class tokens [n, L, D] and averaged patches [n, D] or None; `name` is that of the set in errors.

        Raises ValueError for other shapes, WorkError for features that are not finite.
        """
        tokens = torch.as_tensor(class_tokens)
        patches = None if averaged_patches is None else torch.as_tensor(averaged_patches)
        if tokens.dim() != 3 or (patches is not None and patches.shape != tokens[:, 0].shape):
            found = None if patches is None else tuple(patches.shape)
            raise ValueError(
                f"features of {name} must be [n, blocks, D] and [n, D], got {tuple(tokens.shape)} and {found}"
            )
        require_finite(tokens, name)
        if patches is not None:
            require_finite(patches, name)
            patches = patches.to(device, torch.float32)
        return Inputs(tokens.flatten(1).to(device, torch.float32), patches, tokens.shape[2])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def blocks(self) -> int:
        """From how many blocks there are class tokens."""
        return self.tokens.shape[1] // self.dim

    def take(self, rows: Tensor) -> "Inputs":
        """These rows [m], copied."""
        patches = None if self.patches is None else self.patches.index_select(0, rows)
        return Inputs(self.tokens.index_select(0, rows), patches, self.dim)


@dataclass
class _Piece:
    """Columns of the input with the weights of the heads that read them: rows `rows` of all the heads' classes."""

    columns: slice | None  # of the tokens; None: the averaged patches
    rows: slice
    weight: Tensor  # [rows, width]
    speed: Tensor

    @property
    def place(self) -> float:
        """Where it stands in the input of a head that reads it: oldest block first, patches last."""
        return np.inf if self.columns is None else self.columns.start

    def of(self, inputs: Inputs) -> Tensor:
        if self.columns is None:
            assert inputs.patches is not None
            return inputs.patches
        return inputs.tokens[:, self.columns]


class Heads:
    """Linear heads with C classes, trained by SGD with momentum, each on its own mean cross-entropy, no weight decay.

    Weights begin as N(0, 0.01), the same for all rates of one input, biases as 0; a rate is scaled by batch / 256.
    Nothing of a head depends on the others: one that runs off to infinity leaves them alone.
    """

    def __init__(
        self, heads: Sequence[Head], *, available_blocks: int, dim: int, n_classes: int, device: torch.device, seed: int
    ) -> None:
        # With patches in reverse order: so the readers of every piece lie side by side.
        self.heads = sorted(
            heads, key=lambda head: (0, head.blocks) if not head.averaged_patches else (1, -head.blocks)
        )
        self.n_classes = n_classes
        first = {reads: _first_weights(reads, dim, n_classes, seed) for reads in {head.reads for head in heads}}
        counts = sorted({head.blocks for head in heads})
        parts: list[tuple[int, int] | None] = list(itertools.pairwise([0, *counts]))  # the first is read by all heads
        if any(head.averaged_patches for head in heads):
            parts.append(None)
        self._pieces = [self._piece(part, first, available_blocks, dim, device) for part in parts]
        rows = len(heads) * n_classes
        self.bias = torch.zeros(rows, device=device)
        self._bias_speed = torch.zeros(rows, device=device)
        # Mean over the batch and rate x batch / 256 in one factor: the batch cancels.
        rates = torch.tensor([head.learning_rate / RATE_BATCH for head in self.heads])
        self._factor = rates.to(device)[:, None, None]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def _piece(
        self,
        part: tuple[int, int] | None,
        first: dict[tuple[int, bool], Tensor],
        available_blocks: int,
        dim: int,
        device: torch.device,
    ) -> _Piece:
        """Blocks part[0] to part[1], counted from the last one back, or (None) the averaged patches, with the weights
        that their readers begin with (columns of `first` [C, d], by what a head reads)."""
        readers = [i for i, h in enumerate(self.heads) if (h.averaged_patches if part is None else h.blocks >= part[1])]
        assert readers == list(range(readers[0], readers[-1] + 1))
        weights = []
        for head in self.heads[readers[0] : readers[-1] + 1]:
            begin, end = (-1, 0) if part is None else part  # the patches follow the last block
            weights.append(first[head.reads][:, (head.blocks - end) * dim : (head.blocks - begin) * dim])
        columns = None
        if part is not None:
            columns = slice((available_blocks - part[1]) * dim, (available_blocks - part[0]) * dim)
        rows = slice(readers[0] * self.n_classes, (readers[-1] + 1) * self.n_classes)
        weight = torch.cat(weights).to(device)
        return _Piece(columns, rows, weight, torch.zeros_like(weight))

    def logits(self, inputs: Inputs, out: Tensor | None = None) -> Tensor:
        """Logits [heads, C, n] of inputs of n images."""
        first, *others = self._pieces
        found = torch.addmm(self.bias[:, None], first.weight, first.of(inputs).T, out=out)
        for piece in others:
            found[piece.rows].addmm_(piece.weight, piece.of(inputs).T)
        return found.view(len(self.heads), self.n_classes, -1)

    def step(self, inputs: Inputs, truth: Tensor, cosine: float) -> None:
        """One step of all heads on a batch with labels `truth` [n]; `cosine` is the share of the rate at this step.

        The gradient of cross-entropy in the logits is softmax minus one-hot. A head's speed holds its rate already
        (constant through the training), so that one number moves all weights.
        """
        if self._buffers is None or self._buffers[0].shape[1] != len(truth):
            shape = (len(self.bias), len(truth))
            self._buffers = torch.empty(shape, device=self.bias.device), torch.empty(shape, device=self.bias.device)
        logits = self.logits(inputs, out=self._buffers[0])
        gradient = torch.softmax(logits, 1, out=self._buffers[1].view_as(logits))
        index = truth.expand(len(self.heads), 1, -1)
        gradient.scatter_add_(1, index, torch.full((), -1.0, device=truth.device).expand_as(index))
        gradient *= self._factor
        rows = gradient.flatten(0, 1)
        for piece in self._pieces:
            piece.speed.addmm_(rows[piece.rows], piece.of(inputs), beta=MOMENTUM)
            piece.weight.add_(piece.speed, alpha=-cosine)
        self._bias_speed.mul_(MOMENTUM).add_(rows.sum(1))
        self.bias.add_(self._bias_speed, alpha=-cosine)

    def judge(self, inputs: Inputs, rows: Tensor, truth: Tensor) -> dict[str, tuple[float, float]]:
        """Head id -> (accuracy, mean cross-entropy) on these rows [m] of the inputs, whose labels are `truth` [m].

        A head that ran off to infinity gets (-1, inf).
        """
        hits = torch.zeros(len(self.heads), dtype=torch.float64)
        loss = torch.zeros(len(self.heads), dtype=torch.float64)
        block = min(1024, max(1, _SCORES // len(self.bias)))
        for start in range(0, len(rows), block):
            log_probs = self.logits(inputs.take(rows[start : start + block])).log_softmax(dim=1)
            labels = truth[start : start + block]
            hits += (log_probs.argmax(dim=1) == labels).sum(dim=1).cpu()
            picked = log_probs.gather(1, labels.expand(len(self.heads), 1, -1))
            loss -= picked[:, 0].double().sum(dim=1).cpu()
        return {
            head.id: (float(hits[i]) / len(rows), float(loss[i]) / len(rows)) if loss[i].isfinite() else (-1.0, np.inf)
            for i, head in enumerate(self.heads)
        }

    def weights(self, head: Head) -> tuple[Tensor, Tensor]:
        """Weight [d, C] and bias [C] of one head, on the CPU; its input is class tokens, oldest first, then patches."""
        number = self.heads.index(head)
        own = slice(number * self.n_classes, (number + 1) * self.n_classes)
        parts = [
            piece.weight[own.start - piece.rows.start : own.stop - piece.rows.start]
            for piece in sorted(self._pieces, key=lambda piece: piece.place)
            if piece.rows.start <= own.start < piece.rows.stop
        ]
        return torch.cat(parts, dim=1).T.cpu().contiguous(), self.bias[own].cpu().clone()

    def state(self) -> dict[str, np.ndarray]:
        """All that training goes on from, as arrays; for `load`."""
        return {name: tensor.cpu().numpy() for name, tensor in self._tensors().items()}

    def load(self, state: Arrays) -> bool:
        """Go on from a `state`; False, and nothing changed, where it is that of other heads."""
        own = self._tensors()
        if not all(name in state and state[name].shape == tuple(tensor.shape) for name, tensor in own.items()):
            return False
        for name, tensor in own.items():
            tensor.copy_(torch.from_numpy(np.array(state[name])))
        return True

    def _tensors(self) -> Mapping[str, Tensor]:
        pieces = {f"{kind}{i}": getattr(p, kind) for i, p in enumerate(self._pieces) for kind in ("weight", "speed")}
        return {**pieces, "bias": self.bias, "bias_speed": self._bias_speed}


def _first_weights(reads: tuple[int, bool], dim: int, n_classes: int, seed: int) -> Tensor:
    blocks, patches = reads
    rng = np.random.Generator(np.random.Philox(key=[seed, 2 * blocks + patches]))
    return torch.from_numpy(rng.standard_normal((n_classes, (blocks + patches) * dim), dtype=np.float32) * _INIT_STD)
