"""Install the newest release of one package into the active environment, whatever pins it.

`python ci/newest.py transformers`. With uv where it is found, else with pip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys


def main(arguments: list[str]) -> int:
    """Install; returns the installer's exit status."""
    if len(arguments) != 1 or not arguments[0].replace("-", "").isalnum():
        print("usage: python ci/newest.py PACKAGE", file=sys.stderr)
        return 2
    free = {k: v for k, v in os.environ.items() if k not in ("PIP_CONSTRAINT", "UV_CONSTRAINT")}
    uv = shutil.which("uv")
    installer = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    python = ["--python", sys.executable] if uv else []
    command = [*installer, "install", "--quiet", *python, "--upgrade", arguments[0]]
    return subprocess.run(command, env=free, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
