# docker build --build-arg JAX=tpu --tag recurrax:tpu .
# docker run --volume "$PWD/runs:/recurrax/runs" recurrax:cpu --config=configs/quickstart.py:tiny
FROM python:3.12-slim

# What JAX runs on, one of its extras: cpu, cuda13, cuda12, tpu.
ARG JAX=cpu

WORKDIR /recurrax
COPY . .
RUN pip install --no-cache-dir --editable . "jax[${JAX}]"
ENTRYPOINT ["python", "run.py"]
