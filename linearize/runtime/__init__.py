"""Files, folders, locks, signals and processes."""
