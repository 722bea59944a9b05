# The image of a worker. Flower, the feed and every other command run from it too: docs/containers.md.
FROM python:3.13-slim AS build
WORKDIR /src
RUN python3 -m venv --without-pip /opt/watch
# The dependencies are a layer of their own, made anew only when one of these two files changes: it installs a package
# that is empty, and takes it out again.
COPY pyproject.toml constraints.txt ./
RUN touch README.md LICENSE && mkdir watch_tasks && touch watch_tasks/__init__.py \
 && pip --python /opt/watch/bin/python install --no-cache-dir --quiet -c constraints.txt '.[sql]' \
 && pip --python /opt/watch/bin/python uninstall --quiet --yes watch-tasks
COPY README.md LICENSE ./
COPY watch_tasks watch_tasks
RUN pip --python /opt/watch/bin/python install --no-cache-dir --quiet --no-deps .

FROM python:3.13-slim
# The number is fixed, so that volumes keep their owner from image to image.
RUN groupadd --gid 10001 watch \
 && useradd --uid 10001 --gid watch --no-create-home --home-dir /var/lib/watch --shell /usr/sbin/nologin watch \
 && install --directory --owner watch --group watch --mode 700 /var/lib/watch
COPY --from=build /opt/watch /opt/watch
WORKDIR /app
COPY celeryconfig.py ./
# REMAP_SIGTERM: `docker stop` gives what runs the seconds of the soft shutdown below; what has not ended by then goes
# back to the broker at once. Without it the worker waits for every handler, is killed when the grace period ends, and
# its messages come back only when the broker gives them up.
ENV PATH=/opt/watch/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    REMAP_SIGTERM=SIGQUIT \
    WATCH_DIR=/var/lib/watch \
    WATCH_HEARTBEAT=/tmp/heartbeat
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-m", "watch_tasks.heartbeat", "--max-age", "30"]
# The soft shutdown has to end before the grace period does: 20 s of compose.yaml's 30.
CMD ["celery", "-A", "watch_tasks", "worker", "--loglevel", "INFO", "worker.soft_shutdown_timeout=20"]
