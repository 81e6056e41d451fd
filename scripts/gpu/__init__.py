"""What `scripts/gpu_check.py` is made of: a runner of sections, and the sections."""
