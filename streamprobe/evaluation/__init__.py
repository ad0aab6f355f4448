"""From scored tokens to metrics, intervals and verdicts."""
