"""`ray job submit --working-dir . -- python jobs/retrieve.py --config FILE`, or plain python."""

import sys

from dafm_ray.config import RetrieveConfig
from dafm_ray.job import retrieve_job, run_job

if __name__ == "__main__":
    sys.exit(run_job(RetrieveConfig, retrieve_job))
