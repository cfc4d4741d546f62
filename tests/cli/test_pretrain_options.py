"""What `dinov2 pretrain` offers beyond the plain run: phases, `auto`, initial weights, memory savers; its refusals."""

import json

import pytest
import yaml

from tests.cli.conftest import TINY

HIGH = "phases=[{steps: 3, global_size: 64, local_size: 32, batch_size: 4, lr_scale: 0.2}]"


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_phase_at_twice_the_resolution_ends_in_a_model_of_that_size(dinov2, photos, tmp_path):
    run = tmp_path / "run"
    done = dinov2("pretrain", photos, "-o", run, *TINY, "--set", HIGH, "--set", "eval.every=3")
    assert done.code == 0, done.err
    assert "phase 2 begins after step 6, 64 pixels" in done.err
    assert [line["global_size"] for line in lines(run)][-1] == 64
    assert lines(run)[-1]["images"] == 6 * 8 + 3 * 4
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["image_size"] == 64
    assert json.loads((run / "export" / "preprocessor_config.json").read_text())["crop_size"]["height"] == 64
    embedded = dinov2("embed", photos, "-m", run, "-o", tmp_path / "e", "--workers", "0")
    assert embedded.code == 0, embedded.err


def test_auto_values_are_printed_with_reasons_and_stored_resolved(dinov2, photos, tmp_path):
    run = tmp_path / "run"
    auto = [f"{name}=auto" for name in ("heads.prototypes", "teacher.momentum", "optim.warmup")]
    settings = [word for pair in (("--set", value) for value in auto) for word in pair]
    done = dinov2("pretrain", photos, "-o", run, *TINY, *settings)
    assert done.code == 0, done.err
    assert "heads.prototypes auto, 128: one for 8 of 72 images" in done.err
    assert "teacher.momentum auto, 0.9: the average spans 10 of 6 steps" in done.err
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert (stored["heads"]["prototypes"], stored["teacher"]["momentum"]) == (128, 0.9)
    assert "already done" in dinov2("pretrain", photos, "-o", run, *TINY, *settings).err


def test_init_says_what_was_taken(dinov2, photos, tmp_path):
    first = dinov2("pretrain", photos, "-o", tmp_path / "a", *TINY, "--set", "model.init=structured")
    assert first.code == 0, first.err
    second = dinov2("pretrain", photos, "-o", tmp_path / "b", *TINY, "--init", tmp_path / "a")
    assert second.code == 0, second.err
    assert "of the backbone taken, none missing or unexpected; heads start afresh" in second.err
    wrong = dinov2("pretrain", photos, "-o", tmp_path / "c", *TINY, "--init", tmp_path / "a" / "metrics.jsonl")
    assert wrong.code in (2, 3)
    assert len(wrong.err.strip().splitlines()) == 1


def test_savers_of_memory_train_to_the_same_kind_of_run(dinov2, photos, tmp_path):
    options = ("--set", "train.accumulate=2", "--set", "train.activation_checkpointing=true")
    keep = ("--set", "checkpoint.every=1", "--set", "checkpoint.keep_every=3", "--set", "model.drop_path=0.3")
    done = dinov2("pretrain", photos, "-o", tmp_path / "run", *TINY, *options, *keep)
    assert done.code == 0, done.err
    stored = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert stored == ["step_00000003", "step_00000005", "step_00000006"]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("phases=[{steps: 3, global_size: 60}]", "phases[0].global_size 60 is not a multiple of the patch size 8"),
        ("phases=[{global_size: 64}]", "steps or budget, expected one of them"),
        ("phases=[{steps: 3, size: 64}]", "phases.0.size (--set): found 64, extra inputs are not permitted"),
        ("train.accumulate=3", "train.accumulate: found 3 parts of 8 images (data.batch_size), expected a divisor"),
        ("heads.prototypes=many", "heads.prototypes"),
        ("train.compile=maybe", "train.compile"),
        ("train.compile=graphs", "train.compile=graphs: CUDA graphs need an NVIDIA GPU, this is cpu; use"),
        ("loss.centering=off", "loss.centering"),
    ],
)
def test_wrong_values_are_refused_in_a_line(dinov2, photos, tmp_path, setting, text):
    done = dinov2("pretrain", photos, "-o", tmp_path / "run", *TINY, "--set", setting)
    assert done.code == 2
    assert text in done.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_is_the_same_over_other_ranks():
    """With the same batch on each, or the same batch in all; begun alone or not."""
    from dinov2cli.cli.assembly import batch_per_rank, identity_of, with_batch_of_all
    from dinov2cli.config import PretrainConfig

    def config(batch: int) -> PretrainConfig:
        return PretrainConfig.model_validate({"data": {"batch_size": batch}})

    alone = identity_of(config(16), 1, None)
    assert "ranks" not in alone["data"]  # as the runs of earlier versions
    assert identity_of(config(16), 2, alone) == identity_of(config(8), 2, alone) == alone
    two = identity_of(config(16), 2, None)
    assert identity_of(config(16), 1, two) == identity_of(config(32), 1, two) == identity_of(config(8), 4, two) == two
    assert identity_of(config(12), 2, alone) != alone
    assert identity_of(config(12), 1, two) != two

    whole = {"data": {"global_batch_size": 24}, "phases": [{"steps": 3, "batch_size": 8}]}
    shared = batch_per_rank(PretrainConfig.model_validate(whole), 4)
    assert (shared.data.batch_size, shared.phases[0].batch_size) == (6, 2)
    again = with_batch_of_all(shared, 4)
    assert (again.data.global_batch_size, again.phases[0].batch_size) == (24, 8)


def test_overwrite_is_done_once_when_a_launcher_starts_again(monkeypatch):
    from dinov2cli.cli.talk import Talk
    from dinov2cli.cli.training import _restarted

    talk = Talk(quiet=True)
    assert not _restarted(talk)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not _restarted(talk)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert _restarted(talk)
