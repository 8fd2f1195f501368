"""The config: its tree of dataclasses, files and dotted overrides."""
