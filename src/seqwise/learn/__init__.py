"""Things that train: losses, data orderings, architectures and tokenizers; one file per paper."""
