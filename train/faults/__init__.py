"""What a run survives: bad gradients, kills, damage."""
