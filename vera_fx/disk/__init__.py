"""Files that are whole or not there: one rename, locks, and what a safetensors file says before it is read."""
