"""Ray Serve around pipeline/: nothing here computes."""
