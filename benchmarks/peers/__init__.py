"""Other libraries' objects, plain and accelerated: what a step of theirs costs."""
