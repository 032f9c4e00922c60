"""What computes deltas: one file or folder each."""
