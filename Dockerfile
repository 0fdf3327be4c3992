# The demo in a container: `docker build -t winnow . && docker run --rm --shm-size 2g winnow`
FROM python:3.11-slim

# OpenCV is the headless build, so libgl and glib are not needed. Every package is a wheel, so no compiler is needed.
WORKDIR /winnow
COPY pyproject.toml constraints.txt README.md LICENSE ./

# torch comes first. The default wheels bring 5 GB of CUDA; without a GPU, give the index of CPU builds that pytorch.org
# names: `docker build --build-arg TORCH_INDEX=… .`
ARG TORCH_INDEX=
RUN if [ -n "$TORCH_INDEX" ]; then export PIP_INDEX_URL="$TORCH_INDEX"; fi; \
    pip install --no-cache-dir -c constraints.txt torch torchvision

COPY pipeline pipeline
COPY trainer trainer
COPY conf conf
RUN pip install --no-cache-dir -c constraints.txt . \
    && useradd --create-home winnow && mkdir /data && chown winnow /data

USER winnow
WORKDIR /data
CMD ["winnow", "demo"]
