"""Models side by side: size, memory, speed, accuracy."""
