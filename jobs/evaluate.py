"""`ray job submit --working-dir . -- python jobs/evaluate.py --config FILE`, or plain python."""

import sys

from dafm_ray.config import EvaluateConfig
from dafm_ray.job import evaluate_job, run_job

if __name__ == "__main__":
    sys.exit(run_job(EvaluateConfig, evaluate_job))
