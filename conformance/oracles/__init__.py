"""Oracles: the dumbest correct code, sharing nothing with what they judge."""
