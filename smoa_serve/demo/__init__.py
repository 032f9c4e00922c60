"""The demo: a small base model, five adapters that answer in styles of their own, and a client that asks them all."""
