"""The stages and their order: sweep → squeeze → re-score → promote → report → serve."""
