"""Loads the suite's plugin in a checkout, where nothing needs to be installed."""

pytest_plugins = ["conformance.plugin"]
