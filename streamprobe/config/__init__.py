"""The keys of a run, from a YAML file and the command line."""
