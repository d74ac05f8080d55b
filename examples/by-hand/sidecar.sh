#!/bin/sh
# The same for a client that runs already and is not changed: a second container
# that shares its network.
#
#   ./sidecar.sh CLIENT
set -eu
exec docker run --detach --name "$1-forward" --network "container:$1" \
  --user 0:0 --cap-drop ALL --cap-add NET_ADMIN \
  -v "${IMDS_DIR:-/run/imds}:/run/imds:ro" \
  "${IMDSGATE_IMAGE:-imdsgate}" forward --env-file /run/imds/proxy.env
