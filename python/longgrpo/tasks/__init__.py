"""What is asked and what it is worth: problems, reward functions, held-out accuracy."""
