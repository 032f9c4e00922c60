"""What every question needs: servers, load, timing, bars, results, pages."""
