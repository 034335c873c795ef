"""What two or more methods share, one folder per axis."""
