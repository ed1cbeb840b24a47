"""What an adapter is like beside its score: bounds, spectra, landscapes. Reported, never ranked by."""
