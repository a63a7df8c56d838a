"""Training: the loop, the job around it, the console, failure signatures."""
