"""The commands and the order of their stages: sweep → squeeze → score → register → report → serve."""
