"""The sections of `check_device.py`: a module each, whose rows a process computes."""
