"""Training: the loop, the job around it, the console, and failure signatures."""
