"""`dinov2 doctor` as a user runs it."""


def test_a_sound_machine_is_ready(dinov2, photos):
    done = dinov2("doctor", photos, "--device", "cpu")
    assert done.code == 0, done.err
    assert "torch" in done.err and "images/s" in done.err and "ready" in done.err.splitlines()[-1]
    assert done.out == ""


def test_json(dinov2):
    found = dinov2("doctor", "--device", "cpu", "--json").json
    assert found["ready"] is True
    assert {"name", "found", "state", "advice"} == set(found["findings"][0])


def test_problems_end_with_exit_code_1(dinov2, monkeypatch):
    from dinov2cli.bench import machine

    broken = machine.Finding("torch", "does not compute", "problem", "install it again")
    monkeypatch.setattr(machine, "examine", lambda *_: iter([broken]))
    done = dinov2("doctor")
    assert done.code == 1
    assert "install it again" in done.err and "not ready: see torch above" in done.err


def test_images_that_are_not_there(dinov2, tmp_path):
    done = dinov2("doctor", tmp_path / "none", "--device", "cpu")
    assert done.code == 3 and "no such file or folder" in done.err


def test_bench_data_takes_images_and_others_do_not(dinov2, photos):
    done = dinov2("bench", "knn", photos)
    assert done.code == 2 and "but only data, search, kmeans, hash, copies take any" in done.err
