"""Many queries per row."""
