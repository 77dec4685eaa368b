"""Everything that depends on the model family: `family.py` has the interface, and each family is one file beside it."""
