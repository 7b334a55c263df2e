"""``crosslane data check``: whether a prepared data set holds what its manifest says, and what it looks like."""
