# /// script
# requires-python = ">=3.10"
# dependencies = ["sage-hub"]
#
# [tool.hf-jobs]
# flavor = "cpu-performance"
# timeout = "6h"
# secrets = ["HF_TOKEN"]
#
# [tool.hf-jobs.env]
# UV_INDEX = "https://download.pytorch.org/whl/cpu"
# UV_INDEX_STRATEGY = "unsafe-best-match"
# ///
"""Repair an unlearned model and publish it, on a machine of Hugging Face Jobs.

    hf jobs uv run sage_job.py org/base org/unlearned --forget hf://datasets/org/forget

What follows the script is what follows `sage-hub push`. Nobody is asked, and the job's log ends in
the release as JSON. It runs here too: `uv run sage_job.py org/base org/unlearned --dry-run`.
"""

import sys

from sage_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["push", "--yes", "--json", *sys.argv[1:]]))
