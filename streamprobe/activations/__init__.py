"""Labelled activations on their way from the model to the probes."""
