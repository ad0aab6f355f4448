"""The embedded default: a search task in plain words, a tiny model trained on it, and the script that trained it."""
