"""How to train these models rightly: the reference implementation, usable on its own."""
