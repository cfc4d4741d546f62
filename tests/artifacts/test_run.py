"""The log of a run, read back."""

from dinov2cli.artifacts.run import Journal, read_findings


def test_findings_are_the_steps_of_the_log_each_once(tmp_path):
    assert read_findings(tmp_path) == []
    journal = Journal(tmp_path)
    for text in (
        "step 4: collapsed",
        "continuing from step_00000002",
        "step 4: collapsed",
        "step 6: no longer: collapsed",
    ):
        journal.log(text)
    with open(tmp_path / "log.txt", "ab") as file:
        file.write(b"2026-01-01 cut sh\xff")  # by a kill
    assert read_findings(tmp_path) == ["step 4: collapsed", "step 6: no longer: collapsed"]
