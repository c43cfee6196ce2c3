"""What a model can be trained for, a file each: its rows, its loss, its figures, its predictions."""
