"""Many queries a row."""
