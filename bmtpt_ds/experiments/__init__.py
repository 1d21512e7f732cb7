"""What runs or reads whole runs, a file each."""
