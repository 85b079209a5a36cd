"""Set before transformers is imported: no hub, one thread, no progress bars; cheap collections."""

import atexit
import gc
import os
from typing import Any

import pytest

from conformance.case import Case

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ACCELERATE_DISABLE_RICH": "1",
}.items():
    os.environ.setdefault(_name, _value)

import conformance.torchvision_ops  # noqa: E402, F401

gc.disable()  # the imports leave no garbage, and looking for it takes a third of their time


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Garbage is collected from here on; what is frozen stays so until the process ends.

    Whole collections are rare: with nothing but the frozen in the oldest generation, Python would
    start one every few models, and each walks all that is kept.
    """
    gc.set_threshold(20_000, 20, 20)
    gc.freeze()
    gc.enable()
    atexit.register(_leave_in_a_hurry if hasattr(session.config, "workerinput") else gc.unfreeze)


def _leave_in_a_hurry() -> None:
    """A worker that everybody waits for does not walk its imports once more. Extension modules that
    count what is left at the end would say so there, and nothing else is said that late."""
    gc.freeze()
    gc.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.fixture(autouse=True, scope="module")
def _imports_are_not_garbage() -> None:
    """Trainer collects garbage at each start: a quarter of a second while it walks the imports."""
    gc.collect()
    gc.freeze()


def _kit(fixture: str) -> Any:
    @pytest.fixture(name=fixture)
    def kit(case: Case, unavailable: Any) -> str:
        """The case's model, whose processor can be had here."""
        from conformance import processors

        assert case.model is not None
        return processors.kit_of(case.model.name, fixture, unavailable)

    return kit


kit, image_kit, sound_kit, video_kit = map(_kit, ("kit", "image_kit", "sound_kit", "video_kit"))
