"""What `@check` refuses: a check with a misspelt name would ask nothing and be green."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.check import check, check_of


def claimed() -> None:
    """A claim.

    https://example.org/1
    """


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"needs": ("prepair",)}, "no capability 'prepair'"),
        ({"needs": "loss"}, "no capability 'l'"),
        ({"traits": ("visoin",)}, "no trait 'visoin'"),
        ({"without": ("visoin",)}, "no trait 'visoin'"),
        ({"any_of": ("visoin",)}, "no trait 'visoin'"),
        ({"strategies": ("fsdp9",)}, "no strategy 'fsdp9'"),
        ({"settings": ("lorra",)}, "unknown token 'lorra'"),
        ({"dealt": ("lorra",)}, "unknown token 'lorra'"),
    ],
)
def test_unknown_names(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="check Z01: ") as error:
        check("Z01", **arguments)(claimed)
    assert text in str(error.value)


def test_a_sound_check() -> None:
    found = check_of(check("Z01", needs=("loss",), traits=("vision",), settings=("-",))(claimed))
    assert found is not None and found.claim == "A claim."
