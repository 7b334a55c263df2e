"""How jobs are started and stopped."""
