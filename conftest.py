"""Loads the suite's plugin in a checkout, where nothing needs to be installed."""

from __future__ import annotations

import pytest

import conformance.torchvision_ops  # noqa: F401 - before transformers

pytest_plugins = ["conformance.plugin"]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`-n 2` alone keeps a group on one worker here, as `--dist loadgroup` does."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadgroup"
