"""Many images, drawn by several ranks into a folder that a killed run can go on with."""
