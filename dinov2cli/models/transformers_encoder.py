"""Opens `transformers:DIR` and `transformers:owner/name`: any image encoder that transformers loads, to compare with.

Needs the extra `compare`. Nothing in a directory is executed: code of its own is left alone, pickles are read as plain
tensors only. What its output means: `transformers_encoder_tokens`; its pixels: `transformers_encoder_pixels`.
"""

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2cli.artifacts.manifest import has_manifest, require_kind
from dinov2cli.artifacts.output import file_sha256
from dinov2cli.errors import InputError, UserError
from dinov2cli.models.files import read_json, weight_files
from dinov2cli.models.hub import fetch_model, parse_hub
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.transformers_encoder_pixels import preprocess_of
from dinov2cli.models.transformers_encoder_tokens import TransformersEncoder, native_size

_TOWERS = ("vision_model", "vision_tower", "visual", "vision_encoder")
"""Where models of images and text keep what sees."""
_HUB_FILES = ("*.json", "*.safetensors")


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder in eval mode on the CPU (or the meta device), and what goes with it (see `load.LoadedModel`)."""

    network: TransformersEncoder
    name: str
    preprocess: Preprocess
    fingerprint: dict[str, Any]


def open_transformers(where: str, *, img_size: int | None = None, meta: bool = False) -> OpenedEncoder:
    """Open the image encoder in the directory, or of the hub name, `where`.

    img_size: pixels that `--image-size` says, else what its image processor crops to. meta: shapes only, no weights.
    Raises UserError where transformers is not installed or for an image size the model does not take, InputError for a
    directory that is missing, damaged, or holds something other than an image encoder.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"model 'transformers:{where}' needs transformers: pip install 'dinov2cli[compare]'")
    path, name = _directory(where)
    with _quiet():
        config, kind = _described(path)
        files = _weights(path)
        model = _built(path, config, kind, meta)
        tower, projection = _tower(model)
        preprocess = preprocess_of(path, config, native_size(tower.config))
        try:
            network = TransformersEncoder(tower, projection, preprocess.crop)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if img_size is not None and img_size != preprocess.crop:
            preprocess = preprocess.with_crop(img_size, network.patch_size)
            network.check_size(img_size)
    return OpenedEncoder(network, f"transformers:{name}", preprocess, _fingerprint(path, files, meta))


def _directory(where: str) -> tuple[Path, str]:
    """The folder of a model and how to call it."""
    path = Path(where).expanduser()
    if not path.is_dir():
        hub = parse_hub(where)
        if hub is None or path.exists() or (path.parent != Path(".") and path.parent.is_dir()):
            found = "a file" if path.exists() else "nothing"
            raise InputError(
                f"model 'transformers:{where}': found {found} at {path}; expected a directory that transformers saved, "
                "or a hub name (owner/name)"
            )
        return fetch_model(f"transformers:{where}", *hub, _HUB_FILES), hub[0]
    name = path.resolve().name
    if has_manifest(path):
        require_kind(path, "run", complete=False)
    return (path / "export" if (path / "export" / "config.json").is_file() else path), name


def _described(path: Path) -> tuple[Any, Any]:
    """The configuration in a directory and the class of transformers that goes with it."""
    import transformers

    if not (path / "config.json").is_file():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:4]) or "nothing"
        raise InputError(f"{path} holds no model of transformers (found {inside}): expected config.json and weights")
    raw = read_json(path / "config.json")
    named = f"{path}/config.json is of a model of type {raw.get('model_type')!r}"
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the readers of several hundred configurations raise what they like
        raise InputError(
            f"{named}, which this transformers cannot read ({_first_line(error)}); code of its own is never executed"
        ) from None
    kind = _kind(config)
    takes = getattr(kind, "main_input_name", None)
    if kind is None or (takes != "pixel_values" and getattr(config, "vision_config", None) is None):
        found = f", which takes {takes}" if takes else ""
        raise InputError(f"{named}{found}; expected an image encoder, or a model with one (vision_config)")
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0  # MAE: nothing is hidden from a model that is only looked at
    return config, kind


def _kind(config: Any) -> Any:
    """The class of transformers that a configuration asks for; None where it has none without a head."""
    import transformers

    architecture = next(iter(config.architectures or ()), "")
    named = getattr(transformers, architecture, None) if "VisionModel" in architecture else None
    if named is not None and architecture.endswith("WithProjection"):
        return named
    kind = transformers.MODEL_MAPPING.get(type(config), None)
    return named if kind is None else kind[0] if isinstance(kind, list | tuple) else kind


def _weights(path: Path) -> list[Path]:
    """The files of weights that transformers reads here."""
    pickles = sorted(path.glob("pytorch_model*.bin"))
    if pickles and not any(path.glob("model*.safetensors*")):
        return pickles
    return weight_files(path)


def _built(path: Path, config: Any, kind: Any, meta: bool) -> nn.Module:
    """The model with its weights in float32. InputError where they are damaged or do not fit."""
    # Data2Vec leaves out the pooling that its configuration speaks of, unless asked.
    asked = getattr(config, "use_mean_pooling", False) and "add_pooling_layer" in inspect.signature(kind).parameters
    pooling = {"add_pooling_layer": True} if asked else {}
    try:
        if meta:
            with torch.device("meta"):
                return kind(config, **pooling).eval()
        model, info = kind.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **pooling
        )
    except Exception as error:  # damaged files, missing packages, sizes that do not fit: all mean the same here
        raise InputError(
            f"{path}: transformers cannot load this {kind.__name__} ({_first_line(error)}): fetch or save it again"
        ) from None
    missing = _missing(model, info["missing_keys"])
    if missing:
        own = ", and code of its own, which is never executed" if hasattr(config, "auto_map") else ""
        raise InputError(
            f"{path} does not hold the weights of a {kind.__name__}: {len(missing)} are missing ({missing[0]}, …){own}"
        )
    return model.eval()


def _missing(model: nn.Module, keys: set[str]) -> list[str]:
    """Those weights that an encoder of images needs, of all that were not found."""
    prefix = next((f"{name}." for name in _TOWERS if hasattr(model, name)), "")
    needed = []
    for key in sorted(keys):
        tail = key.removeprefix(prefix)
        # A pooling layer that is not stored is none (tanh), or a norm as it begins (BEiT before fine-tuning).
        spare = tail.startswith("pooler.") or tail.endswith(("mask_token", "position_ids"))
        if key.startswith((prefix, "visual_projection")) and not spare:
            needed.append(key)
    return needed


def _tower(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """What sees in a model, and what is behind its pooled vector."""
    for name in _TOWERS:
        tower = getattr(model, name, None)
        if isinstance(tower, nn.Module):
            return tower, getattr(model, "visual_projection", None)
    return model, None


def _fingerprint(path: Path, files: list[Path], meta: bool) -> dict[str, Any]:
    """As of our own models; the configuration counts too, and so does who computes."""
    config = file_sha256(path / "config.json")
    known = {"file": str(files[0]), "loader": "transformers", "config": config}
    if meta:
        return known
    hashes = [file_sha256(file) for file in files]
    return known | {"sha256": hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its remarks and progress bars, and as it was afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
