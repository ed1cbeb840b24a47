"""`rayft eval`: score adapters and models on your data, or on tasks of lm-evaluation-harness."""
