"""What an update costs, measured and compiled."""
