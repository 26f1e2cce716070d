"""What `tests/bench/gpu.sh` carries to a bare machine and back."""
