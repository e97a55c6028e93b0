"""What the repository builds for itself; run from its root, not part of the wheel."""
