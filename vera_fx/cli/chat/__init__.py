"""``vera-fx chat``: a language model, its adapters, a conversation, and the terminal."""
