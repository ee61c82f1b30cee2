"""Fused kernels of the sequential stage, in Triton only. One operation per file: formula, kernel, launcher.

Conventions, everywhere here:

- B requests, K slots, V draft ids, r rank. Row b of a batch is request slot ``index[b]`` of per-request state
  (temperatures, seeds, processed logits); ``index[b] = -1`` marks padding, which reads and writes nothing.
- Launchers take tensors that exist already, allocate nothing, never synchronise and branch on host values only, so all
  of it can be captured in a CUDA graph.
- A step leaves one packed maximum per vocabulary part and row (``pack.py``); whatever runs next reduces them.
- ``TRITON_INTERPRET=1`` runs every kernel in NumPy; results are the same up to the order of float additions.
"""
