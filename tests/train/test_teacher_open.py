"""Teachers out of files: which models may teach, whose heads are taken, and what is wrong with a directory."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dinov2cli.artifacts.manifest import FILE_NAME, Manifest
from dinov2cli.errors import InputError, UserError
from dinov2cli.models.export import save_hf
from dinov2cli.models.vit import VisionTransformer
from dinov2cli.train.checkpoint import save_checkpoint
from dinov2cli.train.distill import DistillNetwork, TokenAdapter
from dinov2cli.train.network import SSLModel, build_heads, build_ssl_model
from dinov2cli.train.open_teacher import open_teacher

LOSS = {"centering": "softmax", "teacher_temperature": 0.03, "dino_weight": 1.0, "ibot_weight": 1.0}
CONFIG = {"heads": {"freeze_gain": True}, "loss": LOSS}
SIZES = {"prototypes": 24, "hidden": 20, "bottleneck": 12, "layers": 3}


def backbone(width=16, seed=0):
    return VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=width,
        depth=2,
        num_heads=2,
        layerscale=0.5,
        generator=torch.Generator().manual_seed(seed),
    )


def moved(model, seed=1):
    """The same model with a teacher that has moved away from its student."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.teacher.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def pretrained(**changes):
    return moved(build_ssl_model(backbone(), **(SIZES | {"freeze_gain": True, "seed": 2} | changes)))


def run_of(path, models, config=CONFIG, *, kind="run", step=7):
    """A run directory with a checkpoint and exports, of one model ("") or of several students by name."""
    parts = {"student": {}, "teacher": {}}
    for name, model in models.items():
        prefix = f"{name}." if name else ""
        for part, module in (("student", model.student), ("teacher", model.teacher_side())):
            parts[part] |= {prefix + key: tensor.detach() for key, tensor in module.state_dict().items()}
        save_hf(model.teacher.backbone, path / "export" / name if name else path / "export", resize=16, crop=16)
    save_checkpoint(path / "checkpoints", step, parts, state={"images": 7})
    (path / FILE_NAME).write_text(Manifest(kind=kind, complete=True, config=config).to_json())
    return path


def same(module, other):
    own, others = module.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[key], others[key]) for key in own)


@pytest.mark.parametrize("where", ["run", "export"])
@pytest.mark.parametrize("choice", ["auto", "run"])
def test_heads_are_bitwise_those_of_the_runs_moving_average(tmp_path, where, choice):
    model = pretrained(ibot_prototypes=30, ibot_bottleneck=8)
    run = run_of(tmp_path / "big", {"": model})
    opened = open_teacher(run if where == "run" else run / "export", heads=choice)
    teacher = opened.teacher
    assert same(teacher.network, model.teacher.backbone)
    assert same(teacher.dino_head, model.teacher.dino_head) and same(teacher.ibot_head, model.teacher.ibot_head)
    assert not same(teacher.dino_head, model.student.dino_head)
    assert opened.heads == SIZES | {
        "ibot_prototypes": 30,
        "ibot_bottleneck": 8,
        "untied": True,
        "freeze_gain": True,
    }
    assert (opened.temperature, opened.centering) == (0.03, "softmax")
    assert opened.reason == f"the heads of the moving average in {run / 'checkpoints' / 'step_00000007'}"
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    # Whole: what comes out is what the run's teacher makes of the same crops.
    crops = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    indices = torch.tensor([1, 6])
    _, class_logits, patch_logits = model.teacher.class_and_patches(crops, indices)
    found = teacher.logits(teacher.tokens(crops, 2), indices)
    assert torch.equal(found[0], class_logits) and torch.equal(found[1], patch_logits)


def test_sizes_build_heads_like_the_teachers(tmp_path):
    for name, model in (("tied", pretrained(untied=False, layers=2)), ("flat", pretrained(layers=1))):
        opened = open_teacher(run_of(tmp_path / name, {"": model}), heads="run")
        own = build_heads(16, **opened.heads)
        for built, trained in zip(own, (model.teacher.dino_head, model.teacher.ibot_head), strict=True):
            assert (built is None) == (trained is None)
            if built is not None:
                assert [p.shape for p in built.parameters()] == [p.shape for p in trained.parameters()]
        assert opened.teacher.tied == (name == "tied")


def test_heads_are_left_where_they_are_not_wanted(tmp_path):
    run = run_of(tmp_path / "big", {"": pretrained()})
    for choice in ("learned", "none"):
        opened = open_teacher(run, heads=choice)
        assert opened.teacher.patch_head is None and opened.heads is None and opened.temperature is None
        why = {"learned": " (teacher.heads=learned)", "none": ": no term of the loss needs prototypes"}
        assert opened.reason == f"none are taken{why[choice]}"
    with pytest.raises(UserError, match=r"teacher\.heads: found 'some'; expected one of auto, run, learned, none"):
        open_teacher(run, heads="some")


def test_the_newest_checkpoint_counts(tmp_path):
    model = pretrained()
    run = run_of(tmp_path / "big", {"": model}, step=9)
    older = moved(pretrained(), seed=8)
    run_of(tmp_path / "other", {"": older}, step=5)
    (tmp_path / "other" / "checkpoints" / "step_00000005").rename(run / "checkpoints" / "step_00000005")
    assert same(open_teacher(run).teacher.dino_head, model.teacher.dino_head)


def test_without_weights_shapes_are_told_all_the_same(tmp_path):
    run = run_of(tmp_path / "big", {"": pretrained()})
    planned, opened = open_teacher(run, device="meta"), open_teacher(run)
    assert planned.heads == opened.heads and planned.reason == opened.reason
    assert {p.device.type for p in planned.teacher.parameters()} == {"meta"}
    assert {n: p.shape for n, p in planned.teacher.named_parameters()} == {
        n: p.shape for n, p in opened.teacher.named_parameters()
    }


def test_fingerprints_tell_weights_settings_and_heads_apart(tmp_path):
    run, other = (run_of(tmp_path / name, {"": pretrained(seed=s)}) for name, s in (("a", 2), ("b", 3)))
    opened, without = open_teacher(run), open_teacher(run, heads="learned")
    assert opened.name == "a" and opened.fingerprint == open_teacher(run).fingerprint
    assert set(opened.fingerprint) == {"file", "sha256", "config", "heads"}
    assert {k: v for k, v in opened.fingerprint.items() if k != "heads"} == without.fingerprint
    assert open_teacher(other).fingerprint != opened.fingerprint
    # The same backbone with heads that went on training is another teacher.
    state = run / "checkpoints" / "step_00000007" / "state.json"
    state.write_text(state.read_text().replace('"images": 7', '"images": 8'))
    later = open_teacher(run).fingerprint
    assert later["heads"] != opened.fingerprint["heads"] and later["sha256"] == opened.fingerprint["sha256"]


@pytest.mark.parametrize(
    ("ruin", "reason"),
    [
        (lambda run: (run / FILE_NAME).unlink(), "is a backbone alone, not a run"),
        (lambda run: (run / "checkpoints").rename(run / "gone"), "has no checkpoint any more"),
    ],
)
def test_auto_says_why_there_are_no_heads_and_run_insists(tmp_path, ruin, reason):
    run = run_of(tmp_path / "big", {"": pretrained()})
    ruin(run)
    opened = open_teacher(run)
    assert opened.teacher.patch_head is None and opened.heads is None and reason in opened.reason
    with pytest.raises(InputError, match=f"teacher.heads=run: .*{reason}") as raised:
        open_teacher(run, heads="run")
    assert "teacher.heads=learned" in str(raised.value) and "\n" not in str(raised.value)


def test_heads_of_another_backbone_are_refused(tmp_path):
    run = run_of(tmp_path / "big", {"": pretrained()})
    save_hf(moved(pretrained(), seed=4).teacher.backbone, run / "export", resize=16, crop=16)
    for choice in ("auto", "run"):
        with pytest.raises(InputError, match=r"holds another backbone than the export of .*teacher.heads=learned"):
            open_teacher(run, heads=choice)
    open_teacher(run, heads="learned")


def edited(run, change):
    """Rewrite the tensors of the checkpoint's teacher."""
    (file,) = (run / "checkpoints" / "step_00000007" / "teacher").glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    # torch's reader wants the places of the tensors in the header's metadata.
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    places = json.loads(metadata["DCP_SHARDING_INFO"])
    metadata["DCP_SHARDING_INFO"] = json.dumps({name: places[name] for name in tensors})
    save_file(tensors, file, metadata=metadata)


@pytest.mark.parametrize("key", ["mlp.2.bias", "last_layer.weight_g", "last_layer.weight_v", "mlp.0.weight"])
@pytest.mark.parametrize("head", ["dino_head", "ibot_head"])
def test_a_head_with_missing_weights_is_one_clear_line(tmp_path, head, key):
    run = run_of(tmp_path / "big", {"": pretrained()})
    edited(run, lambda tensors: tensors.pop(f"network.{head}.{key}"))
    with pytest.raises(InputError, match=rf"{head} .*{key}.*teacher.heads=learned") as raised:
        open_teacher(run)
    assert "\n" not in str(raised.value)


def test_a_teacher_file_with_missing_keys_is_one_clear_line(tmp_path):
    run = run_of(tmp_path / "big", {"": pretrained()})
    file = run / "export" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "norm1" in name))
    save_file(tensors, file)
    with pytest.raises(
        InputError, match=r"export does not fit this model of \d+ weights; 1 missing: blocks\.\d\.norm1"
    ):
        open_teacher(run)


def test_a_teacher_that_diverged_is_refused(tmp_path):
    network = backbone()
    network.blocks[0].mlp.fc1.weight.data[0, 0] = torch.nan
    save_hf(network, tmp_path / "nan", resize=32, crop=32)
    with pytest.raises(InputError, match=r"nan: blocks\.0\.mlp\.fc1\.weight holds numbers that are not finite"):
        open_teacher(tmp_path / "nan")


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
    run = run_of(tmp_path / "big", {"": pretrained()})
    (file,) = (run / "checkpoints" / "step_00000007" / "teacher").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot be read .*teacher.heads=learned"):
        open_teacher(run)
    assert open_teacher(run, heads="learned").heads is None


@pytest.mark.parametrize("spec", ["baseline:pixels", "baseline:histogram", "sscd:copies.pt", "onnx:copies.onnx"])
def test_what_has_nothing_to_teach_is_refused(spec):
    with pytest.raises(UserError, match=rf"^teacher {spec}: .*expected a backbone"):
        open_teacher(spec)


def test_a_model_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not found"):
        open_teacher(tmp_path / "nothing")
    run = run_of(tmp_path / "emb", {"": pretrained()}, kind="embeddings")
    with pytest.raises(InputError, match="is embeddings, expected a training run"):
        open_teacher(run)


def distilled(teacher_heads, *, width=16, adapter=True, seed=0, heads=True):
    """A student of a teacher of width 16, its heads in the teacher's space where they are learned."""
    student = backbone(width, seed)
    mapped = TokenAdapter(width, 16) if adapter else None
    made = build_heads(16 if teacher_heads == "learned" else width, **SIZES) if heads else (None, None)
    network = DistillNetwork(student, *made, adapter=mapped, adapted_heads=adapter and teacher_heads == "learned")
    return moved(SSLModel(network), seed=seed + 1)


def distilled_config(teacher_heads):
    return CONFIG | {"teacher": {"model": "big", "heads": teacher_heads}}


@pytest.mark.parametrize("adapter", [False, True])
def test_a_distilled_model_teaches_with_the_heads_on_its_tokens(tmp_path, adapter):
    model = distilled("run", width=12, adapter=adapter)
    run = run_of(tmp_path / "small", {"": model}, distilled_config("run"))
    opened = open_teacher(run, heads="run")
    assert same(opened.teacher.dino_head, model.teacher.dino_head)
    assert same(opened.teacher.ibot_head, model.teacher.ibot_head)
    assert opened.teacher.embed_dim == 12


@pytest.mark.parametrize("width", [12, 16])
def test_heads_behind_an_adapter_are_not_those_of_the_backbone(tmp_path, width):
    run = run_of(tmp_path / "small", {"": distilled("learned", width=width)}, distilled_config("learned"))
    opened = open_teacher(run)
    assert opened.heads is None and "behind an adapter" in opened.reason


def test_a_student_without_heads_has_none_to_give(tmp_path):
    run = run_of(tmp_path / "small", {"": distilled("none", heads=False)}, distilled_config("none"))
    assert open_teacher(run).reason == f"{run} was trained without heads"


def test_of_several_students_one_must_be_named(tmp_path):
    models = {"vits14": distilled("run", seed=3), "vitb14": distilled("run", width=12, seed=5)}
    run = run_of(tmp_path / "both", models, distilled_config("run"))
    for spec in (run, run / "export"):
        with pytest.raises(UserError, match=r"several students \(vitb14, vits14\), expected one of them: .*/vitb14"):
            open_teacher(spec)
    for name, model in models.items():
        opened = open_teacher(run / "export" / name)
        assert opened.name == name
        assert same(opened.teacher.network, model.teacher.backbone)
        assert same(opened.teacher.dino_head, model.teacher.dino_head)


def test_heads_that_no_loss_has_trained_are_told(tmp_path):
    config = CONFIG | {"loss": LOSS | {"ibot_weight": 0.0}}
    assert open_teacher(run_of(tmp_path / "big", {"": pretrained()}, config)).reason.endswith(
        "(trained with loss.ibot_weight 0)"
    )
