"""Data of the default run: rows of grade-school science, and a task of questions on them."""
