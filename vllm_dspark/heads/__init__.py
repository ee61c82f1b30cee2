"""The sequential stage and the confidence head: torch (and Triton) only, no vLLM."""
