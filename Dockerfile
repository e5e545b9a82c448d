# Every node of a cluster runs this image.
#   docker build --tag dafm-ray:0.1.0 .
# On Linux torch comes with CUDA, which a CPU node does without; for an image of CPU nodes alone:
#   docker build --tag dafm-ray:0.1.0-cpu --build-arg TORCH_INDEX=URL .
# where URL is PyTorch's index of CPU wheels.
FROM python:3.11-slim-bookworm

# `ray up` reaches the nodes by ssh and rsync from within the head; KubeRay probes with wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /bin/bash dafm

# `ray up` reads HOME from the image. An image that starts from CUDA's would set the last two.
ENV HOME=/home/dafm \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /app
COPY constraints.txt pyproject.toml ./
ARG TORCH_INDEX=
# The packages first: they are the large part and change less often than the code.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/dependencies.txt \
    && pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --requirement /tmp/dependencies.txt boto3 optuna

COPY README.md LICENSE ./
COPY dafm_ray dafm_ray
RUN pip install --no-cache-dir --no-deps --constraint constraints.txt .
COPY jobs jobs
COPY configs configs

USER 1000:1000
CMD ["dafm", "--help"]
