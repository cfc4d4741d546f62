"""Config merging: precedence, and every error at once with its origin and the nearest key."""

import pytest

from dinov2cli.config import DistillConfig, EmbedConfig, PretrainConfig
from dinov2cli.errors import UserError
from dinov2cli.recipe import dotted_keys, load_config, recipe_names, to_yaml


def test_precedence_defaults_recipe_set_flags(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("seed: 1\noptim:\n  lr: 1e-3\n  clip: 1.0\ndata.batch_size: 8\n")
    config = load_config(PretrainConfig, recipe=str(recipe))
    assert (config.seed, config.optim.lr, config.optim.clip, config.data.batch_size) == (1, 1e-3, 1.0, 8)
    assert config.optim.beta1 == 0.9
    config = load_config(PretrainConfig, recipe=str(recipe), sets=["seed=2", "optim.lr=2e-3"])
    assert (config.seed, config.optim.lr, config.optim.clip) == (2, 2e-3, 1.0)
    config = load_config(PretrainConfig, recipe=str(recipe), sets=["seed=2"], flags={"seed": 3, "workers": None})
    assert config.seed == 3


def test_all_errors_are_listed_together(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim: {lrr: 1}\nlr: 3\n")
    with pytest.raises(UserError) as caught:
        load_config(PretrainConfig, recipe=str(recipe), sets=["data.batch_size=-3", "nonsense", "model=3", "zzz=1"])
    assert str(caught.value).split("\n  ") == [
        "6 config errors:",
        "--set nonsense: expected KEY=VALUE, as --set optim.lr=0.001",
        f"optim.lrr (recipe {recipe}): unknown key, did you mean optim.lr?",
        f"lr (recipe {recipe}): unknown key, did you mean optim.lr?",
        "model (--set): is a section, expected one of its keys, as model.arch",
        "zzz (--set): unknown key",
        "data.batch_size (--set): found -3, should be greater than 0",
    ]


def test_single_error_is_one_line():
    with pytest.raises(UserError) as caught:
        load_config(EmbedConfig, sets=["pol=mean"])
    assert str(caught.value) == "1 config error: pol (--set): unknown key, did you mean pool?"


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (["train.steps=3", "train.budget=1 epochs"], "train.steps and train.budget both set, expected one of them"),
        (["crops.local_scale=[0.5,0.2]"], r"crops.local_scale is \[0.5, 0.2\], expected 0 < low <= high <= 1"),
        (["masks.ratio_min=0.9"], "masks.ratio_min is above masks.ratio_max"),
        (
            ["loss.centering=other"],
            r"loss.centering \(--set\): found 'other', should be 'sinkhorn', 'softmax' or 'none'",
        ),
    ],
)
def test_values_that_contradict(sets, text):
    with pytest.raises(UserError, match=text):
        load_config(PretrainConfig, sets=sets)


def test_missing_and_broken_recipes(tmp_path):
    with pytest.raises(UserError, match=r"--config tiny-cpuu is neither a recipe nor a file; did you mean tiny-cpu\?"):
        load_config(PretrainConfig, recipe="tiny-cpuu")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2\n")
    with pytest.raises(UserError, match=r"broken\.yaml is not YAML at line 2"):
        load_config(PretrainConfig, recipe=str(broken))
    broken.write_text("- 1\n")
    with pytest.raises(UserError, match="holds a list, expected keys with values"):
        load_config(PretrainConfig, recipe=str(broken))


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_says_what_it_is_for(name):
    from dinov2cli.recipe import recipe_path

    load_config(DistillConfig if name.startswith("distill-") else PretrainConfig, recipe=name)
    assert recipe_path(name).read_text().startswith("# ")


def test_yaml_round_trip(tmp_path):
    config = load_config(PretrainConfig, recipe="tiny-cpu", sets=["optim.lr=3e-4"])
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    assert load_config(PretrainConfig, recipe=str(file)) == config


def test_names_that_scripts_rely_on():
    keys = dict(dotted_keys(PretrainConfig))
    fixed = "seed data.batch_size train.steps train.budget model.arch optim.lr checkpoint.every log.every eval.every"
    fixed += " crops.global_size crops.local_size crops.local_number"
    assert set(fixed.split()) <= set(keys)
    assert keys["eval.every"] == 0
    assert "tiny-cpu" in recipe_names()


def test_identity_leaves_out_what_never_changes_a_result():
    identity = PretrainConfig(workers=3, device="cpu").identity()
    assert identity == PretrainConfig(workers=0).identity()
    assert identity != PretrainConfig(seed=1).identity()


def test_a_flag_replaces_its_alternative_in_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train: {steps: 300}\n")
    config = load_config(PretrainConfig, recipe=str(recipe), flags={"train.budget": "5m"})
    assert (config.train.steps, config.train.budget) == (None, "5m")
    config = load_config(PretrainConfig, recipe=str(recipe), sets=["train.budget=5m"], flags={"train.steps": 2})
    assert (config.train.steps, config.train.budget) == (2, None)


def test_keys_younger_than_a_run_do_not_make_it_another_one():
    """What runs were begun with before these keys existed is what their defaults do."""
    plain = load_config(PretrainConfig, recipe="tiny-cpu").identity()
    assert not {"scaled_decode", "shuffle", "window", "max_worker_deaths"} & set(plain["data"])
    asked = ["data.scaled_decode=true", "data.shuffle=exact", "data.window=3", "data.max_worker_deaths=0"]
    found = load_config(PretrainConfig, recipe="tiny-cpu", sets=asked).identity()["data"]
    assert found == plain["data"] | {"scaled_decode": True, "shuffle": "exact", "window": 3}


def test_an_architecture_that_is_asked_for_comes_without_the_recipe_s_own_numbers(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {arch: vits14, embed_dim: 64, depth: 3, layerscale: 1.0}")
    kept = load_config(PretrainConfig, recipe=str(recipe), sets=["model.num_heads=1"]).model
    assert (kept.arch, kept.embed_dim, kept.depth, kept.num_heads) == ("vits14", 64, 3, 1)
    asked = load_config(
        PretrainConfig, recipe=str(recipe), sets=["model.depth=2"], flags={"model.arch": "vitb14"}
    ).model
    assert (asked.arch, asked.embed_dim, asked.depth, asked.layerscale) == ("vitb14", None, 2, 1.0)
    both = load_config(DistillConfig, recipe=str(recipe), flags={"students": ["vits14", "vitb14"]})
    assert [(one.arch, one.embed_dim) for one in both.students] == [("vits14", None), ("vitb14", None)]
