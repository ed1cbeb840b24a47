"""`rayft chat`: a conversation in the terminal with a base, an adapter, or two of them side by side."""
