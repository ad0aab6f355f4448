"""Linear probes for every layer and every lag, trained while the language model runs."""

__version__ = "0.1.0"
