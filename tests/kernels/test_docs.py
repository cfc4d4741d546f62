"""docs/kernels.md: its commands run, and what it names exists."""

import re
import shlex
from pathlib import Path

import pytest

from dinov2cli.cli.main import run
from dinov2cli.kernels.dispatch import BACKENDS, OPERATORS, SETTING

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs" / "kernels.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines() if line]


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_run(line, tmp_path, monkeypatch):
    words = shlex.split(line)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("="))
    monkeypatch.chdir(tmp_path)
    short = ["demo:digits" if word == "photos/" else word for word in words[1:]]
    assert run(short) == 0


def test_it_names_every_back_end_and_operator():
    assert f"{SETTING}=auto|{'|'.join(BACKENDS)}" in TEXT
    assert len(re.findall(r"^\| (?!operator|---)[^|]+ \| our ", TEXT, re.M)) == len(OPERATORS)


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\((\.\./[^)]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
