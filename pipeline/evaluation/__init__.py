"""How good the pictures are: whom and what they show, what they are measured by, and the report."""
