"""Switching neurons off in a pipeline without hooks: the value layers get a class with a scale for each neuron."""
