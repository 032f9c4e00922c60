"""Trains the demo's base and adapters, and puts them into `smoa_serve/demo/weights`."""
