"""What a person sees: the TensorBoard page of a run in headless Chromium."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megalm.testing.processes import BIN, environment, run
from megalm.testing.small_runs import Workspace, losses

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed"),
]
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def test_the_page_shows_the_curves_and_their_last_values(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert workspace.train("--zero-stage", "0", "--save", folder, ranks=None).code == 0
    server = subprocess.Popen(
        [BIN / "tensorboard", "--logdir", folder / "tensorboard", "--port", "0"],
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        address = next(match[0] for line in server.stderr if (match := re.search(r"http://[^ ]+", line)))
        # the browser's clock runs ahead of a server on a busy machine: look again until the curves are there
        for attempt in range(6):
            text = looked_at(f"{address}?tagFilter=lm%20loss#timeseries", tmp_path / f"profile{attempt}")
            # under each curve stands a table: run, smoothed, value, step
            shown = [float(value) for value in re.findall(r"Relative \. [\d.]+ ([\d.]+) 10 ", text)]
            if shown:
                break
    finally:
        server.kill()
        server.wait()
    for tag in ("lm loss", "lm loss validation", "lm loss validation ppl"):
        assert tag in text
    assert pytest.approx(losses(folder)[10], rel=1e-3) in shown, text


def looked_at(address: str, profile: Path) -> str:
    """The text of a page as headless Chromium shows it."""
    page = run(
        "chromium", *QUIET, f"--user-data-dir={profile}", "--window-size=1400,2400",
        "--virtual-time-budget=20000", "--dump-dom", address, timeout=120,
    ).output  # fmt: skip
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())
