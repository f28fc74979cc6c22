"""Let this Python environment see the packages of another one, after its own.

.venv-bench/bin/python benchmarks/join_environments.py .venv
"""

from __future__ import annotations

import argparse
import subprocess
import sysconfig
from pathlib import Path

ASK = "import sysconfig; print(sysconfig.get_path('purelib'))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path)
    python = parser.parse_args().environment.absolute() / "bin" / "python"
    theirs = subprocess.run([str(python), "-c", ASK], capture_output=True, text=True, check=True).stdout.strip()
    line = f"import site; site.addsitedir({theirs!r})\n"  # with its editable installs, unlike a plain path
    Path(sysconfig.get_path("purelib"), "project.pth").write_text(line)


if __name__ == "__main__":
    main()
