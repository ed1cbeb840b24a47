"""rayft: search fine-tuning methods and ranks, compress the winners, serve many of them at once."""

__all__ = ["__version__"]

__version__ = "0.2.0.dev0"
