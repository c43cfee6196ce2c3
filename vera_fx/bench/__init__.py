"""What steps of a user's own model cost: frozen, with vera_fx, and with PEFT where it is installed."""
