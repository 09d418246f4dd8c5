"""Networks only: tensors in, tensors out, no files, no requests."""
