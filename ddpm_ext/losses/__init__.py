"""What a model is trained towards, and how good it is."""
