# medseg for a GPU server. Build: docker build -t medseg .   Run: see compose.yaml
# The steps are plain commands: they do the same in any fresh Python 3.12 environment.

FROM python:3.12-slim AS build
WORKDIR /source
RUN pip install --no-cache-dir "build>=1.2"
COPY . .
RUN python -m build --wheel --outdir /dist

FROM python:3.12-slim
# HOME is writable for whatever user the container is started as (caches of matplotlib and torch).
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/tmp

# The dependencies come before the package: this layer (torch with its CUDA libraries, several GB) is built again
# only when pyproject.toml changes. PyPI's Linux wheels of torch carry CUDA; the host provides the driver and the
# NVIDIA container toolkit.
COPY pyproject.toml /tmp/pyproject.toml
RUN python -c 'import tomllib; print(*tomllib.load(open("/tmp/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      > /tmp/requirements.txt \
 && pip install -r /tmp/requirements.txt \
 && rm /tmp/requirements.txt /tmp/pyproject.toml

COPY --from=build /dist/*.whl /tmp/
RUN pip install --no-deps /tmp/*.whl && rm /tmp/*.whl

# Nothing runs as root; runs and predictions go to /work.
RUN useradd --uid 1000 --no-create-home medseg && install -d -o medseg -g medseg /work
USER medseg
WORKDIR /work
VOLUME /work

ENTRYPOINT ["medseg"]
CMD ["--help"]
