"""`ray job submit --working-dir . -- python jobs/train_fusion.py --config FILE`, or python."""

import sys

from dafm_ray.config import FusionConfig
from dafm_ray.job import run_job, train_fusion_job

if __name__ == "__main__":
    sys.exit(run_job(FusionConfig, train_fusion_job))
