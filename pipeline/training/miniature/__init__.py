"""What trains the miniature's networks from nothing: one module per network, and build.py that runs them in order."""
