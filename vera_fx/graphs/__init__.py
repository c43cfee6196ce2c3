"""Which adapted graph a call runs: what is kept, variants, plans, timing."""
