"""What a run logs while it trains, and where that goes."""
