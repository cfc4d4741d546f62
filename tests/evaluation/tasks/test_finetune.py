"""The task `finetune`: what it refuses, what it reports, what it keeps."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dinov2cli.artifacts.parts import Parts
from dinov2cli.data.source import ImageSource
from dinov2cli.distributed import Ranks
from dinov2cli.errors import InputError, UserError
from dinov2cli.evaluation.tasks.finetune import Finetune
from dinov2cli.evaluation.tasks.interface import Judged
from dinov2cli.evaluation.tasks.trial import Trial
from dinov2cli.models.descriptors import Descriptor
from dinov2cli.models.encoder import Encoder, Seen
from dinov2cli.models.load import LoadedModel, load_model
from dinov2cli.models.preprocess import Preprocess
from dinov2cli.models.vit import VisionTransformer

COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60], [60, 180, 180], [180, 60, 180]])
QUICK = {"epochs": 2, "train_batch_size": 12, "lr": 0.04, "layer_decay": 0.9, "mixup": 0.2, "cutmix": 0.0, "ema": 0.9}


class Squares(ImageSource):
    """Noisy squares of a colour; `names` are the classes, -1 among `labels` none."""

    def __init__(self, labels, names=None, first: int = 0, spec: str = "squares") -> None:
        self.spec, self.kind, self._options = f"{spec}{first}", "made", {}
        self.given, self.names, self.first = np.asarray(labels), names, first

    def __len__(self) -> int:
        return len(self.given)

    def read(self, row: int, role: str = "image") -> bytes:
        rng = np.random.default_rng(self.first + int(row))
        pixels = COLOURS[self.given[row] % 6] + rng.normal(0, 40, (20, 24, 3))
        with io.BytesIO() as file:
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "png")
            return file.getvalue()

    @property
    def ids(self) -> list[str]:
        return [f"{self.first + row}.png" for row in range(len(self))]

    paths = ids

    def _own_labels(self):
        return self.given, self.names

    def content_hash(self) -> str:
        return f"{self.spec} {self.given.tolist()}"


def model(**changes) -> LoadedModel:
    numbers = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "layerscale": None}
    network = VisionTransformer(**(numbers | changes), generator=torch.Generator().manual_seed(0)).eval()
    return LoadedModel(network, "small", Preprocess(16, 16), True, {"arch": "small", "seed": 0})


def trial(classes: int = 3, **changes) -> Trial:
    train, test = Squares(np.arange(48) % classes), Squares(np.arange(18) % classes, first=100)
    return Trial(**({"model": model(), "train": train, "test": test} | changes))


def run(task: Finetune, on: Trial) -> Judged:
    task.check(on)
    return task.judge(on, task.collect(on))


def test_figures_predictions_and_settings():
    torch.set_num_threads(1)
    on = trial(classes=6)
    on.train.given[5], on.test.given[3] = -1, -1
    untouched = {name: value.clone() for name, value in on.model.backbone.state_dict().items()}
    judged = run(Finetune(**QUICK | {"epochs": 12}), on)
    told = [(figure.metric, figure.settings["weights"]) for figure in judged.figures]
    assert told == [("top1", "raw"), ("top5", "raw"), ("mean_per_class", "raw"), ("top1_ema", "ema")]
    assert judged.units == [f"{100 + row}.png" for row in range(18) if row != 3]
    table = judged.predictions.to_pydict()
    assert table["id"] == judged.units
    assert table["label"] == [str(row % 6) for row in range(18) if row != 3]
    correct = [a == b for a, b in zip(table["label"], table["prediction"], strict=True)]
    assert table["correct"] == correct and all(1 / 6 < share <= 1 for share in table["confidence"])
    top1, top5, per_class = (figure.statistic.value() for figure in judged.figures[:3])
    assert top1 == pytest.approx(np.mean(correct)) and top1 > 0.5 and top5 >= top1
    by_class = [np.mean([c for c, label in zip(correct, table["label"], strict=True) if label == k]) for k in "012345"]
    assert per_class == pytest.approx(np.mean(by_class))
    found = judged.settings
    assert (found["train_images"], found["steps"], len(found["loss_by_epoch"])) == (47, 47, 12)
    assert found["lr"] == pytest.approx(0.04 * 12 / 256)
    # Others use the same model afterwards.
    assert all(torch.equal(value, untouched[name]) for name, value in on.model.backbone.state_dict().items())
    # Hashes of both sets are told, so that shared images are found.
    assert on.digests[on.train.spec].shape == (47, 32) and on.digests[on.test.spec].shape == (17, 32)


def test_the_reported_weights_are_those_of_the_settings():
    judged = run(Finetune(**QUICK | {"lr": 1.0}, weights="ema"), trial(classes=6))  # so fast that the two differ
    told = [(figure.metric, figure.settings["weights"]) for figure in judged.figures]
    assert told == [("top1", "ema"), ("top5", "ema"), ("mean_per_class", "ema"), ("top1_raw", "raw")]
    ema, raw = judged.figures[0].statistic.value(), judged.figures[3].statistic.value()
    table = judged.predictions.to_pydict()
    assert np.mean([a == b for a, b in zip(table["label"], table["prediction"], strict=True)]) == ema != raw
    assert np.mean(table["correct"]) == ema
    alone = run(Finetune(**QUICK | {"ema": 0.0}), trial())
    assert [f.settings["weights"] for f in alone.figures] == ["raw", "raw"]


def test_the_best_epoch_is_chosen_on_held_out_training_images():
    judged = run(Finetune(**QUICK, choose="best", held_out=0.25), trial())
    found = judged.settings
    assert (found["train_images"], found["held_out_images"]) == (36, 12)
    by_epoch = found["held_out_top1_by_epoch"]
    assert len(by_epoch) == 2 and found["chosen_epoch"] == 1 + int(np.argmax(by_epoch))
    assert len(judged.figures) == 2  # the epoch was chosen for one of the two weights only


@pytest.mark.parametrize(("averaged", "weights"), [(False, "raw"), (True, "ema")])
def test_the_model_is_kept_and_can_be_opened(tmp_path, averaged, weights):
    larger = model()
    larger.preprocess = larger.preprocess.with_crop(24, 8)
    on = trial(model=larger, folder=tmp_path)
    judged = run(Finetune(**QUICK, save=True, averaged_patches=averaged, weights=weights), on)
    folder = tmp_path / judged.settings["saved"]
    opened = load_model(folder)
    assert (opened.backbone.img_size, opened.preprocess.crop) == (24, 24)
    head = load_file(folder / "head.safetensors")
    from dinov2cli.data.loader import CentreView, read_ranges

    view = CentreView(opened.preprocess.resize, opened.preprocess.crop)
    (reading,) = read_ranges(on.test, [(0, 18)], view=view, workers=0)
    with torch.no_grad():
        tokens = opened.backbone(opened.preprocess.normalize(reading.batch.images))
    vector = torch.cat([tokens.cls, tokens.patches.mean(1)], 1) if averaged else tokens.cls
    shares = (vector @ head["weight"].T + head["bias"]).softmax(1).amax(1)
    assert torch.allclose(shares, torch.from_numpy(judged.predictions["confidence"].to_numpy().copy()), atol=1e-5)
    assert (folder / "classes.json").read_text().split() == ["[", '"0",', '"1",', '"2"', "]"]


def test_without_a_folder_nothing_is_kept_and_said_so():
    judged = run(Finetune(**QUICK, save=True), trial())
    assert "saved" not in judged.settings and "not kept" in judged.notes[0]


def test_state_of_other_settings_is_not_taken(tmp_path):
    store = Parts(tmp_path)
    (tmp_path / "squares0").mkdir()
    train = Squares(np.arange(48) % 3, spec=str(tmp_path / "squares"))

    said: list[str] = []

    def continued(task: Finetune, seed: int = 0) -> tuple[bool, Judged]:
        said.clear()
        judged = run(task, Trial(model=model(), train=train, test=train, store=store, seed=seed, say=said.append))
        return any("went on from step 8 of 8" in text for text in said), judged

    fresh, first = continued(Finetune(**QUICK))
    taken, again = continued(Finetune(**QUICK))
    assert (fresh, taken) == (False, True)
    assert again.settings == first.settings and again.predictions.equals(first.predictions)
    for other in (Finetune(**QUICK | {"lr": 0.02}), Finetune(**QUICK, drop_path=0.3), Finetune(**QUICK, flip=0.0)):
        assert not continued(other)[0]
    assert not continued(Finetune(**QUICK), seed=1)[0]
    # How often the state is kept says nothing about it.
    assert continued(Finetune(**QUICK, checkpoint_every=3))[0]


def test_16_bit_training_on_a_cpu():
    judged = run(Finetune(**QUICK, checkpointing=True), trial(precision="bf16"))
    assert judged.settings["precision"] == "bf16" and np.isfinite(judged.settings["loss_by_epoch"]).all()


class Pooling(Encoder):
    """An encoder that is not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.patch_size, self.embed_dim = 1, 8, 6
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6)])
        self.embeddings = torch.nn.Conv2d(3, 6, 8, 8)
        for number, parameter in enumerate(self.parameters()):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))

    def see(self, images, blocks, norm=True) -> Seen:
        raise NotImplementedError

    def forward(self, images):
        self.check_image(images)
        return torch.tanh(self.layers[0](self.embeddings(images).mean((2, 3))))


def test_other_encoders_are_trained_too(tmp_path):
    other = replace(model(), network=Pooling(), name="pooling")
    on = trial(model=other, folder=tmp_path)
    judged = run(Finetune(**QUICK | {"epochs": 10, "lr": 0.2}, save=True), on)
    assert judged.figures[0].statistic.value() > 0.6
    assert any("drop_path" in note for note in judged.notes)
    assert "backbone.layers.0.weight" in load_file(tmp_path / "finetuned" / "classifier.safetensors")
    for asked in ("averaged_patches", "checkpointing"):
        with pytest.raises(UserError, match=f"{asked}: found for model pooling"):
            Finetune(**QUICK, **{asked: True}).check(on)


class Words(Descriptor):
    def __init__(self) -> None:
        super().__init__(4, 16)


class Nothing(Pooling):
    def __init__(self) -> None:
        super().__init__()
        del self.layers, self.embeddings


def test_models_that_cannot_be_trained():
    for network, said in ((Words(), "descriptor and has no gradient"), (Nothing(), "no weights to fine-tune")):
        with pytest.raises(UserError, match=said):
            Finetune().check(trial(model=replace(model(), network=network)))


def test_settings_that_do_not_fit():
    cases = [
        ({}, {"model": replace(model(), preprocess=Preprocess(20, 20))}, "multiple of the patch size 8: use 16 or 24"),
        ({"train_batch_size": 15}, {}, "multiple of 2.*use 14 or 16"),
        ({"train_batch_size": 128}, {"ranks": Ranks(0, 3)}, "multiple of 6.*use 126 or 132"),
        ({"weights": "ema", "ema": 0.0}, {}, "decay above 0"),
        ({}, {"precision": "fp16"}, "bf16 or fp32"),
    ]
    for settings, changes, said in cases:
        with pytest.raises(UserError, match=said):
            Finetune(**settings).check(trial(**changes))


def test_labels_that_do_not_fit():
    one, named = Squares(np.zeros(9, int)), Squares(np.arange(9) % 3, ["a", "b", "z"], first=50)
    cases = [
        ({"train": one, "test": one}, "has one class"),
        ({"train": one}, "2 classes that squares0 lacks"),
        ({"train": Squares(np.arange(9) % 2, ["a", "b"]), "test": named}, r"lacks \(z\)"),
        ({"train": Squares(np.full(9, -1))}, "none of its 9 images has a label"),
    ]
    for changes, said in cases:
        with pytest.raises(InputError, match=said):
            Finetune().check(trial(**changes))
    singles = Squares(np.arange(6))
    with pytest.raises(InputError, match="none can be held out"):
        Finetune(choose="best").check(trial(classes=6, train=singles))
    Finetune().check(trial(train=named, test=named))


def test_a_batch_larger_than_the_set_and_the_same_images_are_noted():
    on = trial(train=Squares(np.arange(9) % 3), test=Squares(np.arange(9) % 3))
    judged = run(Finetune(**QUICK | {"epochs": 1, "train_batch_size": 64}), on)
    assert judged.settings["batch"] == 8
    assert "batch 64 is more than the 9" in judged.notes[0] and "same images" in judged.notes[1]
    assert not on.digests


SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "imagenette"


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared image sets are not here")
def test_on_photographs():
    from dinov2cli.data.source import open_source
    from dinov2cli.evaluation.finetuning.views import Rows

    train, test = (open_source(str(SHARED / f"{name}.parquet")) for name in ("train", "val"))
    on = trial(train=Rows(train, np.arange(0, 3000, 30)), test=Rows(test, np.arange(0, 1000, 25)))
    judged = run(Finetune(epochs=2, train_batch_size=20), on)
    assert judged.settings["steps"] == 10 and len(judged.units) == 40
