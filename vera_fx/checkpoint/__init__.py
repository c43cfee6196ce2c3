"""An adapter on disk: PEFT's layout, LoRA's, and a store of thousands."""
