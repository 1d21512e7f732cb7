"""What the target stage works on: runs side by side, their prior, where they stand, what they log."""
