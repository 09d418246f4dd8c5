"""Cluster: the command line, and how it runs somewhere."""
