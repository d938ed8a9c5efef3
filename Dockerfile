# medseg for a GPU server. Build: docker build -t medseg .   Run: see compose.yaml
# What it finds on the machine: docker run --rm --gpus all medseg doctor
# The steps are plain commands: they do the same in any fresh Python 3.12 environment.
# Every package is pinned by version and SHA-256 (make lock); pip refuses files with any other content.

FROM python:3.12-slim AS build
WORKDIR /source
COPY requirements-build.lock .
RUN pip install --no-cache-dir --require-hashes -r requirements-build.lock
COPY . .
# The build sees no .git: --build-arg MEDSEG_REVISION=$(git rev-parse HEAD) puts the commit into every manifest.
ARG MEDSEG_REVISION=""
RUN python -m build --wheel --no-isolation --outdir /dist

FROM python:3.12-slim
# HOME is writable for whatever user the container is started as (caches of matplotlib and torch), also where the root is
# read-only: nothing else is written but /work.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/tmp

# torch.compile wants a C compiler on GPUs; without one, long trainings run uncompiled.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

# The dependencies come before the package: this layer (torch with its CUDA libraries, several GB) is built again
# only when the locks change. PyPI's Linux wheels of torch carry CUDA; the host provides the driver and the NVIDIA
# container toolkit. What comes as source is built by the pinned setuptools, not by one that pip would fetch.
COPY requirements-build.lock requirements.lock /tmp/
RUN pip install --require-hashes -r /tmp/requirements-build.lock \
 && pip install --require-hashes --no-build-isolation -r /tmp/requirements.lock \
 && rm /tmp/requirements-build.lock /tmp/requirements.lock

COPY --from=build /dist/*.whl /tmp/
RUN pip install --no-deps /tmp/*.whl && rm /tmp/*.whl

# Nothing runs as root; runs and predictions go to /work.
RUN useradd --uid 1000 --no-create-home medseg && install -d -o medseg -g medseg /work
USER medseg
WORKDIR /work
VOLUME /work

ENTRYPOINT ["medseg"]
CMD ["--help"]
