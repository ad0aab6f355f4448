"""From rows of a file to token ids and label codes."""
