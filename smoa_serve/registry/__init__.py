"""Names that users see, and the contents behind them."""
