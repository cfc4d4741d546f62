"""A descriptor in an ONNX file, run by onnxruntime (extra `onnx`): float images [B, 3, S, S] in, vectors [B, D] out.

Input and output names, size and batch are read from the model. Pixels are normalised with ImageNet's mean and standard
deviation. A graph with a fixed batch gets batches of that size, the last one padded.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2cli.errors import InputError, UserError
from dinov2cli.models.descriptors import Descriptor, check_vectors

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_QUIET = 3  # onnxruntime's log level of errors


class OnnxDescriptor(Descriptor):
    """The first output of two axes, L2-normalised in float32.

    `size` (pixels) is needed where the graph leaves height and width open, and must agree where it does not.
    On a GPU it runs there if this onnxruntime can, else on the CPU. Raises InputError, UserError for a wrong size.
    """

    def __init__(self, path: Path, *, size: int | None = None) -> None:
        session = _open(path, ["CPUExecutionProvider"])
        name, dtype, batch, side = _read_input(session, path)
        output, dim = _read_output(session, path)
        super().__init__(dim or 1, _agreed(path, side, size))
        self._path, self._session, self._where = path, session, torch.device("cpu")
        self._input, self._dtype, self._batch, self._output = name, dtype, batch, output
        if dim is None:
            self.embed_dim = self._run(np.zeros((self._batch or 1, 3, self.size, self.size), self._dtype)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> unit vectors [B, D] in float32, on the device of the images."""
        self._follow(images.device)
        pixels = images.cpu().numpy().astype(self._dtype, copy=False)
        step = self._batch or len(pixels)
        found = [self._run(pixels[start : start + step]) for start in range(0, len(pixels), step)]
        return F.normalize(torch.cat(found), dim=1).to(images.device)

    def _run(self, pixels: np.ndarray) -> Tensor:
        """Vectors of at most a batch."""
        rows = len(pixels)
        if self._batch is not None and rows < self._batch:
            pixels = np.concatenate([pixels, np.zeros((self._batch - rows, *pixels.shape[1:]), pixels.dtype)])
        try:
            (vectors,) = self._session.run([self._output], {self._input: pixels})
        except Exception as error:  # onnxruntime raises a dozen types without a common base of its own
            raise InputError(
                f"{self._path} does not run on images {list(pixels.shape)} ({_first_line(error)}); another size can be "
                "given as ?size=PIXELS"
            ) from None
        return check_vectors(torch.from_numpy(vectors).float(), len(pixels), self._path)[:rows]

    def _follow(self, device: torch.device) -> None:
        """Go to the GPU the images are on, where onnxruntime was built for it."""
        if device == self._where:
            return
        self._where = device
        if device.type == "cuda" and "CUDAExecutionProvider" in _runtime().get_available_providers():
            provider = ("CUDAExecutionProvider", {"device_id": device.index or 0})
            self._session = _open(self._path, [provider, "CPUExecutionProvider"])


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            "an onnx: model needs onnxruntime, which is not installed: pip install 'dinov2cli[onnx]'"
        ) from None
    return onnxruntime


def _open(path: Path, providers: list[Any]) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # as above
        raise InputError(f"{path} cannot be read as an ONNX model ({_first_line(error)}): export it again") from None


def _read_input(session: Any, path: Path) -> tuple[str, Any, int | None, int | None]:
    """Name, NumPy type, and batch and side where they are fixed, of the one input; InputError unless it takes images.

    Inputs that the graph has a default for are no concern of ours: onnxruntime lists them elsewhere.
    """
    inputs = session.get_inputs()
    first = inputs[0] if len(inputs) == 1 else None
    shape = list(first.shape) if first else []
    sides = [side for side in shape[2:] if _fixed(side)]
    images = len(shape) == 4 and len(set(sides)) <= 1 and (shape[1] == 3 or not _fixed(shape[1]))
    if first is None or first.type not in _TYPES or not images:
        raise InputError(
            f"{path} takes {_listed(inputs)}; expected one float input of square images, [batch, 3, size, size]"
        )
    return first.name, _TYPES[first.type], shape[0] if _fixed(shape[0]) else None, sides[0] if sides else None


def _read_output(session: Any, path: Path) -> tuple[str, int | None]:
    """Name and length of the first output of two axes; InputError with all of them where there is none."""
    for output in session.get_outputs():
        if output.shape is not None and len(output.shape) == 2 and output.type in _TYPES:
            return output.name, output.shape[1] if _fixed(output.shape[1]) else None
    raise InputError(f"{path} gives {_listed(session.get_outputs())}; expected a float output of vectors, [batch, D]")


def _agreed(path: Path, fixed: int | None, asked: int | None) -> int:
    if fixed is None and asked is None:
        raise UserError(f"{path} takes images of any size: say which, as onnx:{path}?size=288")
    if fixed is not None and asked not in (None, fixed):
        raise UserError(f"{path} takes images of {fixed} x {fixed} pixels only; found size {asked}: leave it out")
    return fixed or asked or 0


def _fixed(axis: Any) -> bool:
    return isinstance(axis, int) and axis > 0


def _listed(tensors: list[Any]) -> str:
    return ", ".join(f"{t.name} {t.type} {list(t.shape or [])}" for t in tensors) or "nothing"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
