"""What is known of base models: which modules are targets, and what transformers needs."""
