"""`secateur tickets`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import secateur as sc
from tests.lottery.helpers import noisy


def test_commands(tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    noisy(levels=1)(folder)
    noisy(levels=1, rewind=sc.rewind_to(9))(folder)
    assert run("tickets", "show", folder) == 0
    out = capsys.readouterr().out
    assert "rewound to initialisation: 4 of 4 trainings finished" in out
    assert "rewound to step 9: 4 of 4" in out and "60.00 %" in out
    options = ["--out", tmp_path / "p", "--name", "rewound to step 9"]
    assert run("tickets", "plot", folder, *options) == 0
    assert "rewound to step 9" in (tmp_path / "p" / "tickets.html").read_text()
    assert (tmp_path / "p" / "tickets.png").is_file() and (tmp_path / "p" / "tickets.csv").is_file()
    assert run("tickets", "compare", folder, "--out", tmp_path / "c.html") == 0
    assert "2 experiments" in capsys.readouterr().out
    assert "rewound to step 9" in (tmp_path / "c.html").read_text()
    assert run("tickets", "plot", folder, "--out", tmp_path / "p", "--name", "no") != 0
    assert "holds no experiment named 'no', but rewound" in " ".join(capsys.readouterr().err.split())
    assert run("tickets", "show", tmp_path) != 0
    assert "holds no experiment" in " ".join(capsys.readouterr().err.split())
