"""What all passes stand on: editing graphs, the protocol, the runner, outlining, functions."""
