"""Install the newest release of one package into the active environment, whatever pins it.

`python ci/newest.py transformers`. With uv where it is found, else with pip. Other packages move
only where the release needs it: the point is one suspect.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec


def main(arguments: list[str]) -> int:
    """Install; returns the installer's exit status."""
    if len(arguments) != 1 or not arguments[0].replace("-", "").isalnum():
        print("usage: python ci/newest.py PACKAGE", file=sys.stderr)
        return 2
    free = {k: v for k, v in os.environ.items() if k not in ("PIP_CONSTRAINT", "UV_CONSTRAINT")}
    uv = shutil.which("uv")
    if uv:  # its --upgrade would move every dependency as well
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable]
        command += ["--upgrade-package", arguments[0], arguments[0]]
    else:
        if not find_spec("pip"):  # an environment that uv made, with uv out of reach
            subprocess.run([sys.executable, "-m", "ensurepip", "--default-pip"], check=False)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", arguments[0]]
    status = subprocess.run(command, env=free, check=False).returncode
    if status == 0:
        print(f"newest: {arguments[0]} {installed(arguments[0])}")
    return status


def installed(name: str) -> str:
    """The version that a fresh interpreter sees."""
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
