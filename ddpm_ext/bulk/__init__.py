"""Draws many images into a folder, by one process or several, and writes the files that evaluation scripts read."""
