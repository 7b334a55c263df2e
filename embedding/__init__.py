"""Whatever crosses ranks: tables, their exchange and their update."""
