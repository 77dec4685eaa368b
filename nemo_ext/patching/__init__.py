"""Switching neurons off in a pipeline without hooks: its value layers get a class whose neurons have a scale."""
