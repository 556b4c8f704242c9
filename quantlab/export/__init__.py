"""File formats, one a file; each writes and reads back."""
