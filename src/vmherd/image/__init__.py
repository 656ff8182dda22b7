"""What an instance starts from: the images, and the built-in guest."""
