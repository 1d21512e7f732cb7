"""What each command does, from its arguments to its files: everything around the rooms below."""
