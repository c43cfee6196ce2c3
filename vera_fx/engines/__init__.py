"""Other engines that serve an adapter: vLLM, by the LoRA adapter that computes the same."""
