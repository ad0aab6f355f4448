"""What trains all probes at once from a stream of activations, one module a method."""
