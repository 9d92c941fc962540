# The service on CPU (default) or NVIDIA GPUs, for amd64 and arm64.
#   docker build --tag qwen3-encoder .
#   docker build --tag qwen3-encoder:cuda --build-arg BACKEND=cuda13 .
#
# Both start from the same slim base: MLX's CUDA wheels bring the CUDA libraries with them from PyPI, and the driver is
# the host's, mounted by the NVIDIA container runtime. An nvidia/cuda base would carry the same libraries twice.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG BACKEND=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# encoder/qwen3/cpu/kernels/c/panels.c is compiled when the package is installed.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The dependencies are a layer of their own, which a change of the code does not touch: two empty packages stand in for it.
# What is built of them must go, or it passes for newer than the code.
COPY pyproject.toml setup.py README.md LICENSE ./
RUN python -m venv /opt/venv \
    && mkdir -p app encoder/qwen3/cpu/kernels/c \
    && touch app/__init__.py encoder/__init__.py encoder/qwen3/cpu/kernels/c/panels.c \
    && /opt/venv/bin/pip install ".[${BACKEND}]" \
    && rm -rf build *.egg-info

COPY app app
COPY encoder encoder
RUN /opt/venv/bin/pip install --no-deps --force-reinstall .

# On CPU the renamed OpenBLAS is made now, so that the first start need not; it chooses its kernels for the CPU it runs on.
RUN mkdir -p /var/cache/qwen3-encoder \
    && if [ "${BACKEND}" = cpu ]; then \
        XDG_CACHE_HOME=/var/cache /opt/venv/bin/python -c \
            "from encoder.qwen3.cpu.blas import activate; blas = activate(); print(blas); exit(blas.remedy)"; \
    fi


# The load test of docker-compose.yml, built only when asked for; it reads every response with the client's own packages.
FROM build AS load
RUN /opt/venv/bin/pip install "locust>=2.32"
USER 1000
ENTRYPOINT ["/opt/venv/bin/locust"]


FROM python:${PYTHON}-slim AS service
RUN useradd --uid 1000 --create-home encoder \
    && install --directory --owner encoder --group encoder /models
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=encoder:encoder /var/cache/qwen3-encoder /var/cache/qwen3-encoder

# Inside a container only 0.0.0.0 can be reached from outside; what may reach the port is for `docker run --publish` to say.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models \
    XDG_CACHE_HOME=/var/cache \
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
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"QWEN3_ENCODER_PORT\"]}/livez', timeout=4)"]
CMD ["qwen3-encoder", "serve"]
