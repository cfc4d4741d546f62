"""Opens any MODEL: run, Hugging Face directory or hub name, official `.pth`, timm directory, name, descriptor file,
comparator of transformers, baseline."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch

from dinov2cli.artifacts.manifest import has_manifest, require_kind
from dinov2cli.artifacts.output import file_sha256
from dinov2cli.errors import InputError, UserError
from dinov2cli.models.baselines import open_baseline
from dinov2cli.models.descriptors import Descriptor, canonical_descriptor, open_descriptor, parse_descriptor
from dinov2cli.models.encoder import Encoder
from dinov2cli.models.files import read_json, read_pth, read_safetensors, read_weights, weight_files
from dinov2cli.models.hub import fetch_model, parse_hub
from dinov2cli.models.preprocess import Preprocess, default_preprocess, read_preprocess
from dinov2cli.models.registry import ARCHITECTURES, build, parse_architecture, suggest
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.models.weights import (
    StateDict,
    detect_format,
    from_hf,
    from_official,
    from_timm,
    infer_architecture,
    load_strict,
)

log = logging.getLogger(__name__)

_HF_TYPES = ("dinov2", "dinov2_with_registers")
_BASELINE, _TRANSFORMERS = "baseline:", "transformers:"
_WEIGHT_FILES = (".pth", ".pt", ".safetensors")
T = TypeVar("T")


@dataclass
class LoadedModel:
    """A model ready for features.

    `network` is in eval mode; `fingerprint` tells two models apart ({"file", "sha256"} or {"arch", "seed"});
    `random` is true when no weights were read; `copy_detection` when its similarities are made for finding copies, so
    that the published thresholds hold; `config` is the hash of the configuration beside the weights, where there is
    one: it decides what the same weights compute.
    """

    network: VisionTransformer | Encoder | Descriptor
    name: str
    preprocess: Preprocess
    random: bool
    fingerprint: dict[str, Any]
    copy_detection: bool = False
    config: str = ""

    @property
    def backbone(self) -> VisionTransformer:
        """The network, where it is a backbone of ours; UserError for a descriptor, a comparator and a baseline."""
        network = self.encoder
        if isinstance(network, Encoder):
            raise UserError(
                f"model {self.name} is only for comparisons; expected a DINOv2 backbone here: transformers: and "
                "baseline: models serve `dinov2 eval`"
            )
        return network

    @property
    def encoder(self) -> VisionTransformer | Encoder:
        """The network, where it has tokens; UserError for a descriptor, which has none."""
        if isinstance(self.network, Descriptor):
            raise UserError(
                f"model {self.name} gives one vector per image and has no tokens; expected a backbone here: "
                "sscd: and onnx: files serve `dinov2 embed` and `dinov2 dedup`"
            )
        return self.network


def load_model(
    spec: str | Path, *, device: torch.device | str = "cpu", img_size: int | None = None, seed: int = 0
) -> LoadedModel:
    """Open the MODEL `spec`.

    `img_size` changes the crop (and the resize in proportion) the model is used at; for an architecture name it is
    also the grid of its position embedding. `seed` draws the random weights of an architecture name, which come with
    a logged warning. On the device "meta" no weights are read, only what tells their shapes, and there is no sha256.
    Raises InputError for a model that is missing, unreadable or of another kind, UserError for an image size the patch
    does not divide.
    """
    spec = str(spec)
    described = parse_descriptor(spec)
    if described is not None:
        opened = open_descriptor(described, img_size=img_size)
        opened.network.to(device if torch.device(device).type != "meta" else "cpu")
        return LoadedModel(
            opened.network, opened.name, opened.preprocess, False, opened.fingerprint, opened.copy_detection
        )
    path = Path(spec).expanduser()
    meta = torch.device(device).type == "meta"
    if spec.startswith((_BASELINE, _TRANSFORMERS)):
        loaded = _load_comparator(spec, img_size, meta)
    elif path.is_dir():
        loaded = _load_directory(path, path.resolve().name, meta)
    elif path.is_file():
        loaded = _load_file(path, meta)
    elif parse_architecture(spec) is not None:
        loaded = _random_model(spec, img_size, seed, meta)
    else:
        loaded = _load_hub(spec, path, meta)
    if img_size is not None and img_size != loaded.preprocess.crop:
        loaded = replace(loaded, preprocess=loaded.preprocess.with_crop(img_size, loaded.encoder.patch_size))
    loaded.network.to(device).eval()
    return loaded


def canonical_spec(spec: str) -> str:
    """Return a MODEL that means the same from any directory and however it was spelled: paths made absolute."""
    described = canonical_descriptor(spec)
    if described is not None:
        return described
    scheme = _TRANSFORMERS if spec.startswith(_TRANSFORMERS) else ""
    path = Path(spec.removeprefix(scheme)).expanduser()
    return f"{scheme}{path.resolve()}" if path.exists() else spec


def _load_comparator(spec: str, img_size: int | None, meta: bool) -> LoadedModel:
    scheme, _, rest = spec.partition(":")
    if f"{scheme}:" == _BASELINE:
        baseline = open_baseline(rest)
        return LoadedModel(baseline.network, spec, baseline.preprocess, False, baseline.fingerprint)
    from dinov2cli.models.transformers_encoder import open_transformers

    opened = open_transformers(rest, img_size=img_size, meta=meta)
    return LoadedModel(opened.network, opened.name, opened.preprocess, False, opened.fingerprint)


def _random_model(arch: str, img_size: int | None, seed: int, meta: bool) -> LoadedModel:
    backbone = build(arch, seed=seed, img_size=img_size, device="meta" if meta else "cpu")
    if not meta:
        log.warning("model %s has random weights (seed %d): its features are those of an untrained network", arch, seed)
    preprocess = default_preprocess(backbone.img_size, backbone.patch_size)
    fingerprint = {"arch": arch, "img_size": backbone.img_size, "seed": seed}
    return LoadedModel(backbone, arch, preprocess, True, fingerprint)


def _load_directory(path: Path, name: str, meta: bool) -> LoadedModel:
    """A run, a Hugging Face or a timm directory, told apart by what is inside."""
    if has_manifest(path):
        require_kind(path, "run", complete=False)
        students = sorted(inside.parent.name for inside in (path / "export").glob("*/config.json"))
        if students and not (path / "export" / "config.json").is_file():
            raise InputError(
                f"{path} is a run of several students; expected one of them: "
                f"{' or '.join(str(path / 'export' / student) for student in students)}"
            )
        if not (path / "export" / "config.json").is_file():
            raise InputError(
                f"{path} is a run without an export yet: let it finish (run the same command again to continue it), "
                "or take the model out of a checkpoint with `dinov2 export`"
            )
    if (path / "export" / "config.json").is_file():
        path = path / "export"
    if not (path / "config.json").is_file():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:4]) or "nothing"
        raise InputError(
            f"{path} holds no model (found {inside}): expected a run with export/, or config.json with "
            "model.safetensors of a Hugging Face Dinov2 or timm model"
        )
    config = read_json(path / "config.json")
    if config.get("model_type") in _HF_TYPES:
        return _load_hf(path, name, config, meta)
    if "architecture" in config:
        return _load_timm(path, name, config, meta)
    raise InputError(
        f"{path}/config.json is of a model of type {config.get('model_type')!r}, expected {' or '.join(_HF_TYPES)} "
        f"(Hugging Face) or a timm config; transformers:{path} takes any image encoder to `dinov2 eval`"
    )


def _load_hf(path: Path, name: str, config: dict[str, Any], meta: bool) -> LoadedModel:
    kwargs = _described(path / "config.json", lambda: hf_architecture(config))
    state = read_weights(path, shapes_only=meta)
    backbone = _fill(kwargs, from_hf(state), str(path), meta)
    preprocess = default_preprocess(backbone.img_size, backbone.patch_size)
    if (path / "preprocessor_config.json").is_file():
        preprocess = read_preprocess(path / "preprocessor_config.json").fitted(backbone.patch_size)
    config_hash = file_sha256(path / "config.json")
    return LoadedModel(backbone, name, preprocess, False, _fingerprint(weight_files(path), meta), config=config_hash)


def hf_architecture(config: dict[str, Any]) -> dict[str, Any]:
    """VisionTransformer arguments from a Hugging Face config.json, defaults as in transformers.

    Without our own `dinov2cli` entry positions are resampled as transformers does it: to the exact size, with
    antialias for register models only. Raises KeyError, TypeError or ValueError for values that make no sense.
    """
    registers = int(config.get("num_register_tokens", 4)) if config["model_type"] != "dinov2" else 0
    ours = config.get("dinov2cli", {})
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {config['hidden_act']!r} instead of 'gelu'")
    return {
        "img_size": _square(config.get("image_size", 224)),
        "patch_size": _square(config.get("patch_size", 14 if config["model_type"] == "dinov2" else 16)),
        "in_chans": int(config.get("num_channels", 3)),
        "embed_dim": int(config.get("hidden_size", 768)),
        "depth": int(config.get("num_hidden_layers", 12)),
        "num_heads": int(config.get("num_attention_heads", 12)),
        "mlp_ratio": float(config.get("mlp_ratio", 4)),
        "ffn": "swiglu" if config.get("use_swiglu_ffn", False) else "mlp",
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "num_register_tokens": registers,
        "layerscale": float(config.get("layerscale_value", 1.0)),
        "norm_eps": float(config.get("layer_norm_eps", 1e-6)),
        "interpolate_offset": float(ours.get("interpolate_offset", 0.0)),
        "interpolate_antialias": bool(ours.get("interpolate_antialias", bool(registers))),
    }


def _load_timm(path: Path, name: str, config: dict[str, Any], meta: bool) -> LoadedModel:
    state = from_timm(read_weights(path, shapes_only=meta))
    arguments, cfg = config.get("model_args") or {}, config.get("pretrained_cfg") or config
    kwargs = _described(path, lambda: infer_architecture(state, arguments.get("num_heads")))
    # timm always resamples positions to the exact size with antialias.
    kwargs |= {"interpolate_offset": 0.0, "interpolate_antialias": True}
    backbone = _fill(kwargs, state, str(path), meta)

    def preprocess() -> Preprocess:
        default = default_preprocess(backbone.img_size, backbone.patch_size)
        crop = int(cfg["input_size"][-1]) if "input_size" in cfg else default.crop
        return Preprocess(
            resize=round(crop / cfg.get("crop_pct", crop / default.resize)),
            crop=crop,
            mean=tuple(cfg.get("mean", default.mean)),
            std=tuple(cfg.get("std", default.std)),
            interpolation=cfg.get("interpolation", "bicubic"),
        ).fitted(backbone.patch_size)

    stored = _described(path / "config.json", preprocess)
    config_hash = file_sha256(path / "config.json")
    return LoadedModel(backbone, name, stored, False, _fingerprint(weight_files(path), meta), config=config_hash)


def _load_file(path: Path, meta: bool) -> LoadedModel:
    """A single weights file; its architecture is read off the shapes."""
    if path.suffix not in _WEIGHT_FILES:
        raise InputError(f"{path} is not a model: expected a directory or a file ending in {', '.join(_WEIGHT_FILES)}")
    read = read_safetensors if path.suffix == ".safetensors" else read_pth
    checkpoint = read(path, shapes_only=meta)

    def convert() -> StateDict:
        state = from_official(checkpoint)
        names = detect_format(state)
        return from_hf(state) if names == "hf" else from_timm(state) if names == "timm" else state

    state = _described(path, convert)
    kwargs = _described(path, lambda: infer_architecture(state))
    backbone = _fill(kwargs, state, str(path), meta)
    preprocess = default_preprocess(backbone.img_size, backbone.patch_size)
    return LoadedModel(backbone, path.stem, preprocess, False, _fingerprint([path], meta))


def _load_hub(spec: str, path: Path, meta: bool) -> LoadedModel:
    """A model on the hub, by `owner/name` or `owner/name@revision`; else the error for an unknown MODEL."""
    named = parse_hub(spec)
    # A name below an existing folder, or ending as a weights file, is a mistyped path rather than a hub name.
    if named is None or (path.parent != Path(".") and path.parent.is_dir()) or path.suffix in _WEIGHT_FILES:
        plain = ", ".join(name for name in ARCHITECTURES if "_reg" not in name)
        raise InputError(
            f"model {spec!r} not found: {suggest(spec)}Expected a run or model directory, a .pth file, a hub name "
            f"(owner/name) or an architecture ({plain}, each also with _reg4); to compare with: transformers:DIR, "
            "baseline:pixels, baseline:histogram"
        )
    patterns = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
    return _load_directory(fetch_model(spec, *named, patterns), named[0], meta)


def _fill(kwargs: dict[str, Any], state: StateDict, source: str, meta: bool) -> VisionTransformer:
    """A backbone of these numbers with these weights in float32, or on the meta device with their shapes."""
    try:
        with torch.device("meta"):
            backbone = VisionTransformer(**kwargs)
    except UserError as error:
        raise InputError(f"{source}: {error}") from None
    if not meta:
        backbone.to_empty(device="cpu")
    load_strict(backbone, state, source)
    return backbone


def _described(source: Path, read: Callable[[], T]) -> T:
    """Call `read`, naming `source` in whatever is wrong with the values found there."""
    try:
        return read()
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{source} does not describe a DINOv2 model ({type(error).__name__}: {error})") from None


def _fingerprint(files: list[Path], meta: bool) -> dict[str, Any]:
    """Of weights in several files: the first, and the hash of all their hashes."""
    hashes = [] if meta else [file_sha256(file) for file in files]
    together = hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()
    return {"file": str(files[0])} | ({"sha256": together} if hashes else {})


def _square(value: Any) -> int:
    """One side out of 224 or [224, 224]."""
    sides = value if isinstance(value, list) else [value, value]
    if sides[0] != sides[-1]:
        raise ValueError(f"a square is expected, found {sides}")
    return int(sides[0])
