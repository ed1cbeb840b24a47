"""`rayft analyze`: bounds, spectra and loss landscapes of what was trained."""
