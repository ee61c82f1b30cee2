"""The parts of ``gpu_serving.py``: acceptance, models without weights, what runs inside an engine, tables."""
