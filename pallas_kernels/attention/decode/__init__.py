"""One query a row."""
