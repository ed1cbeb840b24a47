"""vLLM as the engine on GPUs: a plugin that serves adapters at their true ranks, and the engine over it.

vLLM pads the factors of all adapters to the largest rank that it is configured for. The plugin replaces what
stands above and below vLLM's LoRA code, and touches nothing else of it:

- above, the manager that vLLM's model runners call (`worker`), which loads adapters into memory that was
  taken before vLLM sized its KV cache (`arena`), and tells the kernels which token uses which adapter;
- below, the method by which each linear layer computes its product (`adapters`), which adds the product of
  each token's adapter with the kernels of `rayft.kernels.grouped_lora`.
"""
