"""What depends on the family of models: `family.py` is the interface, and each family is one file beside it."""
