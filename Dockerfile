# The service on CPU (default) or NVIDIA GPUs, for amd64 and arm64.
#   docker build --tag qwen3-encoder .
#   docker build --tag qwen3-encoder:cuda --build-arg BACKEND=cuda13 .
#
# Both images use the same slim base. The CUDA libraries come from PyPI as dependencies of MLX, so an nvidia/cuda base
# would carry them twice. The driver belongs to the host; the NVIDIA container runtime mounts it.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG BACKEND=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# setup.py compiles the CPU kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first, in a layer that stays cached while only the code changes: without setup.py and with two empty
# packages, this installs nothing else. The build folder goes, or setuptools would take the empty packages from it.
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
RUN python -m venv /opt/venv \
    && mkdir app encoder \
    && touch app/__init__.py encoder/__init__.py \
    && /opt/venv/bin/pip install --constraint requirements/dev.txt ".[${BACKEND}]" \
    && rm -rf build *.egg-info

COPY setup.py ./
COPY app app
COPY encoder encoder
RUN QWEN3_ENCODER_REQUIRE_KERNELS=1 /opt/venv/bin/pip install --no-deps --force-reinstall .


# The load test of docker-compose.yml, built only for that profile. It decodes every response with app's client.
FROM build AS load
RUN /opt/venv/bin/pip install --constraint requirements/dev.txt locust
USER 1000
ENTRYPOINT ["/opt/venv/bin/locust"]


FROM python:${PYTHON}-slim AS service
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin encoder \
    && install --directory --owner encoder --group encoder /models
COPY --from=build /opt/venv /opt/venv

# A container is reached from outside only at 0.0.0.0. `docker run --publish` decides who can reach the port.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CUDA_CACHE_PATH=/tmp/cuda \
    HF_HOME=/models \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    QWEN3_ENCODER_HOST=0.0.0.0 \
    QWEN3_ENCODER_PORT=8000

USER 1000
WORKDIR /home/encoder
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --start-interval=2s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"QWEN3_ENCODER_PORT\"] or 8000}/livez', timeout=4)"]
CMD ["qwen3-encoder", "serve"]
