"""The memory that a run will need: planned by formula, run dry without storage, counted while it runs."""
