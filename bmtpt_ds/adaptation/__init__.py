"""What the target stage works on: runs side by side, where they stand, what they log."""
