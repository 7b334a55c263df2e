"""The mathematics of one rank: no ranks, no files."""
