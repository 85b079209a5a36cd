"""Set before transformers is imported: no hub, one thread, no progress bars; cheap collections."""

import gc
import os
from collections.abc import Iterator
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


@pytest.fixture(autouse=True, scope="module")
def _imports_are_not_garbage(_thawed: None) -> None:
    """Trainer collects garbage at each start: a quarter of a second while it walks the imports.

    Whole collections are rare: with nothing but the frozen in the oldest generation, Python would
    start one every few models, and each walks all that is kept.
    """
    gc.set_threshold(20_000, 20, 20)
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


@pytest.fixture(scope="session")
def _thawed() -> Iterator[None]:
    """What was frozen is collected at the end, as extension modules that count expect."""
    yield
    gc.unfreeze()
