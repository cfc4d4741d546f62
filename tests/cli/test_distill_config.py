"""Settings of `dinov2 distill`: students, what contradicts, what makes a run another one, and whose recipe it is."""

import pytest

from dinov2cli.cli.assembly import resolve_automatic
from dinov2cli.config import DistillConfig, PretrainConfig
from dinov2cli.errors import UserError
from dinov2cli.recipe import command_of, load_config, recipe_names, to_yaml

DISTILL = [name for name in recipe_names() if name.startswith("distill-")]


def config(*sets: str) -> DistillConfig:
    return load_config(DistillConfig, sets=sets)


def test_students_take_what_is_said_for_all_and_have_their_own(tmp_path):
    found = config(
        "model.embed_dim=64", "model.drop_path=0.1", "students=[tiny,{arch: tiny, name: flat, depth: 2, drop_path: 0}]"
    )
    one, two = found.learners().values()
    assert list(found.learners()) == ["tiny", "flat"]
    assert (one.embed_dim, one.depth, one.drop_path) == (64, None, 0.1)
    assert (two.embed_dim, two.depth, two.drop_path) == (64, 2, 0.0)
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(found))
    assert load_config(DistillConfig, recipe=str(file)) == found


def test_one_student_needs_no_name():
    assert list(config("model.arch=tiny").learners()) == [""]
    assert [model.arch for model in config("students=[tiny]").learners().values()] == ["tiny"]
    assert list(config("students=[tiny]").learners()) == [""]
    assert list(PretrainConfig().learners()) == [""]


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (["students=[tiny,tiny]"], "students: found tiny twice, expected a name for each"),
        (["students=[tiny,{name: a/b}]"], "students: found the name 'a/b', expected letters, digits"),
        (["students=[tiny,{name: loss}]"], "found the name 'loss'"),
        (["students=[{archh: tiny}]"], "students.0.archh"),
        (["loss.dino_weight=0", "loss.ibot_weight=0"], "loss: found no term that learns from the teacher"),
        (["loss.ibot_share=0"], "loss.ibot_share is 0"),
        (["teacher.cache=true"], "teacher.cache: found no data.views"),
        (["teacher.cache=true", "data.views=2", "phases=[{steps: 2}]"], "teacher.cache: found phases"),
        (["data.views=0"], "data.views"),
        (["teacher.heads=mine"], "teacher.heads"),
        (["train.steps=3", "train.budget=5m"], "train.steps and train.budget both set"),
    ],
)
def test_what_contradicts_is_one_line(sets, text):
    with pytest.raises(UserError) as caught:
        config(*sets)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_identity_is_that_of_the_weights():
    """How the teacher computes and what is reported may change where a run goes on."""
    plain = config("data.views=2").identity()
    same = ["teacher.cache=true", "teacher.precision=bf16", "teacher.compile=true", "report.images=0", "log.every=1"]
    assert config("data.views=2", *same).identity() == plain
    for other in ("loss.gram_weight=1", "teacher.model=a", "average.momentum=0.9", "students=[tiny,vitt8]"):
        assert config("data.views=2", other).identity() != plain


def test_auto_is_replaced_once_and_kept_where_a_run_goes_on():
    values = {"heads.prototypes": (64, "as the teacher"), "loss.teacher_temperature": (0.05, "so it ended")}
    found, chosen = resolve_automatic(config("loss.teacher_temperature=0.03"), values)
    assert (found.heads.prototypes, found.loss.teacher_temperature) == (64, 0.03)
    assert chosen == {"heads.prototypes": "auto, 64: as the teacher"}
    found, chosen = resolve_automatic(config(), values, {"heads": {"prototypes": 32}})
    assert (found.heads.prototypes, found.loss.teacher_temperature) == (32, 0.05)
    assert chosen["heads.prototypes"] == "auto, 32: as this run began"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_belongs_to_one_command(name):
    configs = {"pretrain": PretrainConfig, "distill": DistillConfig}
    own = "distill" if name in DISTILL else "pretrain"
    other = "pretrain" if name in DISTILL else "distill"
    assert command_of(name, configs) == own
    load_config(configs[own], recipe=name)
    with pytest.raises(UserError, match=f"--config {name}: is a recipe of `dinov2 {own}`") as caught:
        load_config(configs[other], recipe=name, others={own: configs[own]})
    assert len(str(caught.value).splitlines()) == 1


def test_a_wrong_key_is_still_told_as_such(tmp_path):
    """A recipe that no command knows whole is not taken for another command's."""
    file = tmp_path / "mine.yaml"
    file.write_text("average: {momentum: 0.9}\nlosss: {dino_weight: 1}\n")
    with pytest.raises(UserError, match=r"losss.dino_weight .*unknown key, did you mean loss.dino_weight\?"):
        load_config(DistillConfig, recipe=str(file), others={"pretrain": PretrainConfig})


def test_recipes_are_what_their_headers_say():
    photos, teacher = (load_config(c, recipe=n) for c, n in (
        (DistillConfig, "distill-photos-cpu"), (PretrainConfig, "photos-cpu")))  # fmt: skip
    assert photos.crops == teacher.crops and photos.augment == teacher.augment
    assert (photos.train.budget, photos.train.steps) == ("10m", None)
    paper = load_config(DistillConfig, recipe="distill-vits14")
    assert (paper.optim.lr, paper.optim.reference_batch, paper.data.global_batch_size) == (1e-3, 2048, 2048)
    assert (paper.crops.global_size, paper.crops.local_size, paper.heads.untied) == (224, 98, True)
    assert (paper.loss.ibot_share, paper.loss.koleo_weight, paper.model.drop_path) == (1.0, 0.1, 0.0)
    features = load_config(DistillConfig, recipe="distill-features")
    assert not features.loss.needs_prototypes and features.loss.feature_weight == 1.0


@pytest.mark.parametrize(("recipe", "whole"), [("distill-tiny-cpu", "tiny-cpu"), ("distill-photos-cpu", "photos-cpu")])
def test_students_have_at_most_a_quarter_of_the_parameters(recipe, whole):
    from dinov2cli.cli.assembly import overrides
    from dinov2cli.models.registry import build

    def parameters(settings) -> int:
        backbone = build(settings.model.arch, device="meta", **overrides(settings))
        return sum(p.numel() for p in backbone.parameters())

    student, teacher = load_config(DistillConfig, recipe=recipe), load_config(PretrainConfig, recipe=whole)
    assert parameters(student) <= parameters(teacher) / 4
