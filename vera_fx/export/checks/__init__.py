"""What is looked at in a program's file before torch sees it: no code comes from files."""
