"""On-disk formats, one file each."""
