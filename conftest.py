"""Loads the suite's plugin in a checkout, where nothing needs to be installed."""

from __future__ import annotations

from typing import Any

import pytest

import conformance.torchvision_ops  # noqa: F401 - before transformers

pytest_plugins = ["conformance.plugin"]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`-n 2` alone keeps a group on one worker here, as `--dist loadgroup` does."""
    told = getattr(config, "workerinput", None)
    if told is not None:  # a worker reads the command line, where nothing says so
        config.option.loadgroup = told["loadgroup"]
    elif getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadgroup"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist how the controller deals out."""
    node.workerinput["loadgroup"] = node.config.option.dist == "loadgroup"
