"""LoRA-Squeeze: bring trained adapters to lower ranks. Maths on tensors and artifacts, no training."""
