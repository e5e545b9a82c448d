"""`ray job submit --working-dir . -- python jobs/precompute.py --config FILE`, or plain python."""

import sys

from dafm_ray.config import PrecomputeConfig
from dafm_ray.job import plan_job, precompute_job, run_job

if __name__ == "__main__":
    sys.exit(run_job(PrecomputeConfig, precompute_job, plan_job))
