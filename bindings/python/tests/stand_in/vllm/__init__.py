"""vLLM's import structure around deep_gemm_utils, and nothing else: every function says whose it is."""
