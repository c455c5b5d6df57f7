"""The embedded default's data: rows of grade-school science, and questions on what they teach."""
