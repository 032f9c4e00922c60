"""Command line: `smoa-serve …`."""
