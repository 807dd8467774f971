"""A converted checkpoint on disk."""
