"""The base model on disk: its weights, their fingerprints and spectral orders."""
