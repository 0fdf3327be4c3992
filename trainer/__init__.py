"""Winnow's trainer: pretrains a CLIP on shards, evaluates it, exports it. The shards are the whole interface."""

import os

# Read once, when torch loads OpenMP. Threads that spin while they wait for each other make a training on CPU up to ten
# times slower as soon as anything else runs on the machine; threads that sleep lose nothing that can be measured.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
