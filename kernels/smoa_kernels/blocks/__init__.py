"""Partitions of a layer and the blocks of its weight between them."""
