"""tox's own hook file, found beside `tox.ini`: which build of torch uv installs.

The same choice as `ci/run`'s: CONFORMANCE_TORCH is what uv's --torch-backend is given, by default
`cpu` where there is no NVIDIA GPU, else `auto`; `index` leaves it to the configured index.
"""

from __future__ import annotations

import os
import shutil

_backend = os.environ.get("CONFORMANCE_TORCH") or ("auto" if shutil.which("nvidia-smi") else "cpu")
if _backend != "index":
    os.environ.setdefault("UV_TORCH_BACKEND", _backend)
