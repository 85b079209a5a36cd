"""Loads the suite's plugin in a checkout, where nothing needs to be installed."""

import conformance.torchvision_ops  # noqa: F401 - before transformers

pytest_plugins = ["conformance.plugin"]
