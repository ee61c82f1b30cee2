"""A Triton backend called "cpu" that compiles nothing: with ``TRITON_INTERPRET=1``, kernels run in NumPy without a GPU.

vLLM 0.32 selects its V2 runner on a CPU when such a backend is registered (entry-point group ``triton.backends``,
``../*.dist-info``); it covers neither graphs nor streams nor events.
"""
