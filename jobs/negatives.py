"""`ray job submit --working-dir . -- python jobs/negatives.py --config FILE`, or plain python."""

import sys

from dafm_ray.finetune.config import MineConfig
from dafm_ray.job import negatives_job, run_job

if __name__ == "__main__":
    sys.exit(run_job(MineConfig, negatives_job))
