"""What was adapted and how, as text, page and picture."""
