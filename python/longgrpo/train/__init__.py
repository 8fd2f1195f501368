"""The trainer: one run from a config to an adapter, a log and a summary."""
