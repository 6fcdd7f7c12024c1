"""Architectures that train; one file per paper."""
