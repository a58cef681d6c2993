"""What a person is told on stderr."""

from __future__ import annotations

import pytest

from nas.progress import Reporter


def test_brackets_are_said_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter().say("pip install 'hwnas[export]'")
    assert capsys.readouterr().err == "pip install 'hwnas[export]'\n"
    Reporter(quiet=True).say("nothing")
    assert capsys.readouterr().err == ""
