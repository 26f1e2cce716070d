"""faiss and torch in one process, each with an OpenMP of its own."""

import subprocess
import sys


def test_faiss_and_torch_work_in_one_process_and_faiss_is_loaded_late() -> None:
    program = (
        "import sys, torch\n"
        "import cp_plugin.evaluation.metrics as evaluate\n"
        "assert 'faiss' not in sys.modules\n"
        "torch.set_num_threads(2)\n"
        "for _ in range(3):\n"
        "    x = torch.randn(3000, 64) @ torch.randn(64, 64)\n"
        "    y = torch.arange(3000) % 5\n"
        "    print(evaluate.knn(x, y, x, y, 1).accuracy)\n"
        "    torch.nn.functional.conv2d(torch.randn(64, 3, 32, 32), torch.randn(8, 3, 3, 3))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["100.0"] * 3, done.stderr
