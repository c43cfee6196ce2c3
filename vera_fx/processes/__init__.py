"""Several processes: what is wrapped around a model, and what of it travels between processes."""
