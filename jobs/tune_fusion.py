"""`ray job submit --working-dir . -- python jobs/tune_fusion.py --config FILE`, or python."""

import sys

from dafm_ray.config import StudyConfig
from dafm_ray.job import run_job, tune_fusion_job

if __name__ == "__main__":
    sys.exit(run_job(StudyConfig, tune_fusion_job))
