#!/bin/sh
# A client that follows a proxy which comes back under another address. Beside it
# this must be running on the host:
#
#   imdsgate locate --watch --env-file /run/imds/proxy.env
#
#   ./follow.sh NAME IMAGE COMMAND [ARGUMENT...]
set -eu
name=$1 image=$2
shift 2
exec docker run --detach --name "$name" --user 0:0 --cap-add NET_ADMIN \
  -v "${IMDS_DIR:-/run/imds}:/run/imds:ro" \
  -v "$(command -v imdsgate):/usr/local/bin/imdsgate:ro" \
  "$image" imdsgate forward --env-file /run/imds/proxy.env -- "$@"
