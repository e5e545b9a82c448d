"""`ray job submit --working-dir . -- python jobs/finetune.py --config FILE`, or plain python."""

import sys

from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.job import finetune_job, run_job

if __name__ == "__main__":
    sys.exit(run_job(FinetuneConfig, finetune_job))
