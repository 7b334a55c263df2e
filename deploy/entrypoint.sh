#!/bin/sh
# Starts the service (no argument, or `serve` with its options), or any other command of crosslane.
set -eu

if [ "$#" -gt 0 ] && [ "$1" != serve ]; then
    exec crosslane "$@"
fi
[ "$#" -eq 0 ] || shift

home=${CROSSLANE_HOME:?names the folder of the service}
export CROSSLANE_TOKEN_FILE="${CROSSLANE_TOKEN_FILE:-$home/token}"
umask 077
mkdir -p "$home"

# The token lies in a file, so that clients inside the container (docker compose exec) find it as well.
if [ -n "${CROSSLANE_TOKEN:-}" ]; then
    printf '%s\n' "$CROSSLANE_TOKEN" > "$CROSSLANE_TOKEN_FILE.new"
elif [ ! -s "$CROSSLANE_TOKEN_FILE" ]; then
    python3 -c 'import secrets; print(secrets.token_urlsafe(32))' > "$CROSSLANE_TOKEN_FILE.new"
    echo "A token was made; it is in $CROSSLANE_TOKEN_FILE" >&2
fi
if [ -e "$CROSSLANE_TOKEN_FILE.new" ]; then
    mv "$CROSSLANE_TOKEN_FILE.new" "$CROSSLANE_TOKEN_FILE"
fi
unset CROSSLANE_TOKEN

# A container takes its processes along when it ends: the jobs write their checkpoints first.
exec crosslane serve --stop-jobs "$@"
