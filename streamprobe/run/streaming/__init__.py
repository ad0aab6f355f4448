"""Training on chains that come without an end: round by round, with a report now and then."""
