"""Ways to fit all probes at once from a stream of activations."""
