"""A fine-tuned model on disk: the backbone as every other model of this program, its head beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dinov2cli.artifacts.output import write_aside
from dinov2cli.evaluation.finetuning.model import Classifier
from dinov2cli.models.export import write_hf
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer

_BACKBONE = "backbone."


def save_classifier(
    model: Classifier,
    folder: Path,
    class_names: Sequence[str],
    preprocess: Preprocess,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder` and return it; `weights` (parameters by name) stand in for the model's own.

    A DINOv2 backbone becomes a Hugging Face directory, which `load_model` opens; the head is `head.safetensors` with
    `weight` [C, D] and `bias` [C], its classes `classes.json`. Another encoder is kept with its head as parameters by
    name in `classifier.safetensors`. Raises WorkError on a full disk.
    """
    own = {name: value.detach() for name, value in model.state_dict().items()} | dict(weights or {})
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.backbone, VisionTransformer):
        write_hf(
            model.backbone,
            folder,
            read=lambda names: {name: own[_BACKBONE + name] for name in names},
            preprocess=preprocess,
            card="Fine-tuned for classification: `head.safetensors` holds the linear layer over the class token"
            + (" and the mean of the patch tokens." if model.averaged_patches else "."),
        )
        _write(folder / "head.safetensors", {name: own[f"head.{name}"] for name in ("weight", "bias")})
    else:
        _write(folder / "classifier.safetensors", own)
    text = json.dumps(list(class_names), indent=2, ensure_ascii=False) + "\n"
    write_aside(folder / "classes.json", lambda path: _write_text(path, text))
    return folder


def _write(file: Path, tensors: Mapping[str, Any]) -> None:
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_aside(file, lambda path: save_file(plain, path, metadata={"format": "pt"}))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
