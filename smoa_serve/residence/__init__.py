"""Where adapters reside, by hand and by policy: stored, host, slot, resident, merged."""
