"""Holds what the three steps share. Every program imports this file before torch."""

import os

# OpenMP's threads spin while they wait and so take the cores from ranks and processes that have work. It reads
# the variable when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# When a rank is gone, torch's C++ parts warn the others of each broken connection with a page of stack frames, after
# the line that says what happened.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
