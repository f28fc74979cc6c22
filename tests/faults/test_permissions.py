"""Files that may not be read and folders that may not be written, also for a root that has given up its special rights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY

LAST_RIGHTS = "-dac_override,-dac_read_search"


def extract(data: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "embedpipe", "extract", str(data), *TINY, "--cache-dir", str(cache), "--json"]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may do everything, and setpriv, which takes rights away, is not installed")
        command = ["setpriv", f"--bounding-set={LAST_RIGHTS}", f"--inh-caps={LAST_RIGHTS}", *command]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )


def test_an_image_without_permission_is_reported_and_tried_again(photos: Path, tmp_path: Path) -> None:
    secret = photos / "red" / "000.png"
    secret.chmod(0)
    done = extract(photos, tmp_path / "cache")
    assert done.returncode == 3, done.stderr
    data = json.loads(done.stdout.splitlines()[-1])["data"]
    assert data["failed"] == [{"path": str(secret), "stage": "read", "reason": "Permission denied"}]
    assert data["computed"] == 35
    secret.chmod(0o644)
    assert json.loads(extract(photos, tmp_path / "cache").stdout.splitlines()[-1])["data"]["computed"] == 1


def test_a_folder_without_permission_is_reported(photos: Path, tmp_path: Path) -> None:
    (photos / "red").chmod(0)
    done = extract(photos, tmp_path / "cache")
    (photos / "red").chmod(0o755)
    assert done.returncode == 3, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])["data"]["failed"]
    assert failed == [{"path": str(photos / "red"), "stage": "read", "reason": "Permission denied"}]


def test_a_cache_that_may_not_be_written_is_one_line(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o555)
    done = extract(photos, tmp_path / "cache")
    assert done.returncode == 74, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Permission denied" in lines[0]
    assert "Traceback" not in done.stderr
