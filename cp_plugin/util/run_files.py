"""Names of the files that a run leaves in its folder."""

from __future__ import annotations

POISON_FILE = "poison.safetensors"
"""The poison that the run crafted, sampled, or used a part of."""
CONFIG_FILE = "config.yaml"
"""The completed configuration of a run of the embedded engine."""
RESULT_FILE = "result.json"
"""What came of a run of the embedded engine, of a study or of the demo."""
KNN_FILE = "knn.csv"
"""The monitor's evaluations, a row each."""
CHECKPOINT = "last"
"""Name, without ending, of the checkpoint that a run of the embedded engine goes on from."""
SOLO_ARGS_FILE = "args.json"
"""The configuration of a run of solo-learn, as it writes it itself."""
