# docker build -t opsin .                              runs on CPUs
# docker build --build-arg BASE=cuda -t opsin:cuda .   runs on NVIDIA GPUs
ARG BASE=cpu

FROM debian:12-slim AS build-cpu
# For any x86-64 CPU with AVX2, not only for the one that builds.
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF"

FROM nvidia/cuda:12.9.1-devel-ubuntu24.04 AS build-cuda
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_CUDA=ON"

FROM build-${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential ca-certificates python3 python3-venv
WORKDIR /src
COPY requirements.lock ./
# llama.cpp is compiled here; a change of Opsin's own code does not compile it again.
RUN python3 -m venv /opt/opsin && /opt/opsin/bin/pip install --no-cache-dir --no-deps --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/opsin/bin/pip install --no-cache-dir --no-deps .

FROM debian:12-slim AS run-cpu

FROM nvidia/cuda:12.9.1-runtime-ubuntu24.04 AS run-cuda

FROM run-${BASE} AS run
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libgomp1 python3 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/opsin /opt/opsin
RUN useradd --create-home --uid 10001 opsin && mkdir /models
USER opsin
WORKDIR /models
# A container's own loopback is closed to everybody else, so the server needs a key: -e OPSIN_API_KEY=…
ENV PATH=/opt/opsin/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin OPSIN_HOST=0.0.0.0
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s --interval=30s --timeout=5s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["opsin"]
CMD ["serve"]
