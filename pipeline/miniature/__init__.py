"""The embedded default: the same model classes, very small, so that the whole way runs on a CPU with no download."""
