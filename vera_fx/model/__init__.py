"""What a user does to a model: adapt, switch, merge, generate, unload."""
