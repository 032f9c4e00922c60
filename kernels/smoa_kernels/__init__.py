"""Deltas of a mixed batch of SMoA and HiRA adapters."""
