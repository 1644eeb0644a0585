# A node in a container. For machines without an accelerator:  docker build -t gossamer .
# For NVIDIA ones:  docker build -t gossamer --build-arg ACCELERATOR=cuda .    and run it with --gpus all
FROM python:3.11-slim-bookworm AS build

ARG ACCELERATOR=cpu

# What libp2p's fastecdsa is compiled with; none of it is in the image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libgmp-dev \
    && rm -rf /var/lib/apt/lists/*

RUN python -m venv /opt/gossamer
ENV PATH=/opt/gossamer/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch comes first and by itself: it is by far the largest, and changes least.
WORKDIR /source
COPY constraints.txt ./
RUN case "$ACCELERATOR" in \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        cuda) ;; \
        *) echo "ACCELERATOR is cpu or cuda, not $ACCELERATOR" >&2; exit 1 ;; \
    esac \
    && pip install -c constraints.txt "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml README.md LICENSE ./
COPY p2p p2p
COPY gossip gossip
COPY training training
COPY node node
COPY netsim netsim
COPY cli cli
RUN pip install -c constraints.txt '.[huggingface]'


FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends libgmp10 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /data --shell /usr/sbin/nologin gossamer \
    && install -d -m 0700 -o gossamer -g gossamer /data

COPY --from=build /opt/gossamer /opt/gossamer
ENV PATH=/opt/gossamer/bin:$PATH GOSSAMER_HOME=/data PYTHONUNBUFFERED=1

# Key, settings, run, checkpoints: all that a node is. Whoever has the volume goes on where it was.
USER gossamer
WORKDIR /data
VOLUME /data
EXPOSE 4100

# It runs, and it answers; whether it gets ahead is in what it answers.
HEALTHCHECK --interval=60s --timeout=30s --start-period=300s --retries=3 CMD ["gossamer", "status", "--quiet"]

# Checkpoint, goodbye, exit: give it more than docker's ten seconds, docker stop -t 30
STOPSIGNAL SIGTERM
ENTRYPOINT ["gossamer"]
CMD ["run"]
