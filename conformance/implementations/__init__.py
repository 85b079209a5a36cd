"""The adapters shipped with the suite, one a file, each with its expectations beside it."""
