# wasi-nn-backend with CUDA. Build from the project's root: docker build -f docker/cuda.Dockerfile -t wasi-nn-cuda .
# Run: docker run --rm --gpus all -v "$PWD:/work" wasi-nn-cuda run --nn-graph default=model.gguf,n_gpu_layers=98 module.wasm
FROM nvidia/cuda:12.6.3-devel-ubuntu24.04 AS build
ARG CMAKE_ARGS="-DGGML_CUDA=on"
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /opt/wasi-nn && CMAKE_ARGS="$CMAKE_ARGS" /opt/wasi-nn/bin/pip install --no-cache-dir ".[demo]"

FROM nvidia/cuda:12.6.3-runtime-ubuntu24.04
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 python3 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home wasi
COPY --from=build /opt/wasi-nn /opt/wasi-nn
ENV PATH=/opt/wasi-nn/bin:$PATH
USER wasi
WORKDIR /work
ENTRYPOINT ["wasi-nn"]
CMD ["doctor"]
