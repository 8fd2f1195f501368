"""Problems, reward functions and held-out accuracy."""
