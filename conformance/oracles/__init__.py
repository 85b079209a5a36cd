"""The dumbest correct code: plain torch, one process, float64 where the caller gives it.

No module here imports transformers, `impl` or another module of the suite, so that a library that
is consistently wrong is still caught. Python loops are welcome; speed is not a goal.
"""
