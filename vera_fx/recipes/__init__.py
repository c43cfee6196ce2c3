"""Training from a recipe: what to train on what, the run's folder, and what is done with a finished run."""
