"""What every probe is compared with."""
