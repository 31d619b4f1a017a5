# The two commands of the README in a container, each at build time of its own stage:
#   docker build --target demo .
#   docker build --target test .
# With CUDA: --build-arg BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04 --build-arg CONSTRAINTS=/dev/null
ARG BASE=python:3.12-slim
FROM ${BASE} AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends make git gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /llm2clip_hf
COPY . .
ARG CONSTRAINTS=constraints.txt
ENV CONSTRAINTS=${CONSTRAINTS}

FROM base AS demo
RUN make demo

FROM base AS test
RUN make test

FROM base
RUN make .venv/.demo
ENV PATH=/llm2clip_hf/.venv/bin:${PATH}
ENTRYPOINT ["llm2clip"]
